"""Seeded faults under real nodes: whatever happens, answers are those of one undisturbed process."""
