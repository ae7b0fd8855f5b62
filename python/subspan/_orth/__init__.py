"""The parts of subspan.orth."""
