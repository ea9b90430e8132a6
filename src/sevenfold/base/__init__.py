"""What every room stands on: config, console, errors, hardware, records, storage."""
