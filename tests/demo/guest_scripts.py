"""Scripts of Linux guests: files with checksums on a disk, written and verified."""

from __future__ import annotations

WRITE = """\
set -e
mke2fs -q /dev/vda >&-
mount -t ext2 /dev/vda /mnt
echo writing
i=0
while [ ! -e /mnt/enough ]; do
    seq $i 20000 | tee /mnt/$i | md5sum >/mnt/$i.md5; sync
    i=$((i + 1)); [ $i -lt 25 ] || touch /mnt/enough
    sleep 0.2
done
sync; echo "wrote $i files"; while :; do sleep 1; done
"""
"""Writes 25 files, a few a second, and then waits."""
VERIFY = """\
set -e
mount -t ext2 /dev/vda /mnt
cd /mnt
for sum in *.md5; do
    [ "$(md5sum <${sum%.md5})" = "$(cat $sum)" ] || { echo "$sum is damaged"; exit 1; }
done
echo "verified $(ls *.md5 | wc -l) files"
"""
