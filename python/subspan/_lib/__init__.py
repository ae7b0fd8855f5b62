"""What every family needs: arrays of all libraries, devices, checks, files. Imports no family."""
