"""Sets kept durably under names."""
