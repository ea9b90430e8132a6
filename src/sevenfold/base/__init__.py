"""What every room stands on: config, console, disk, errors, faults, hardware, records, storage."""
