"""What no page uses, and published checkpoints and data need."""
