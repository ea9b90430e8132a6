"""What every room stands on: config, console, errors, faults, hardware, records, storage."""
