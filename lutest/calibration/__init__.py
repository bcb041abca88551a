"""Another device, another day: tables that are carried over, planned for, checked and corrected while in use."""
