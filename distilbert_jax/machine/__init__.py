"""Where a run lives: disks and buckets, processes, devices."""
