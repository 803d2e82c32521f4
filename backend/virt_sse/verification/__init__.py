"""What really runs, beside what was asked for: evidence from QEMU, from the processes below it and from the
images themselves.
"""
