"""The parts of :mod:`subspan.grassmann`."""
