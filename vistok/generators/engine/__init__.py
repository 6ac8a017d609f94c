"""What generators share: caches, guidance, drawing, decoding sessions, compiled steps."""
