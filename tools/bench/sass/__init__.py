"""Parts of tools/sass_report.py: the machine code of the kernels, the paths through it, the time it ought to take."""
