"""What every room stands on.

Modules: config, console, disk, errors, faults, hardware, permissions, records, seals,
storage, workers.
"""
