"""Models that several processes hold together: by FSDP2 or by tensor parallelism."""
