"""Pictures and tables; nothing here computes a finding."""
