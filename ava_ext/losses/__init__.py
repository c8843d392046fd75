"""Every loss class, one module per component."""
