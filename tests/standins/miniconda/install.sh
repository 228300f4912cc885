#!/bin/sh
# NAME:  Miniconda3-standin
# PLAT:  linux-64
#
# Installer of the Miniconda stand-in, for tests and the lab only. It takes the options of the
# official installer that the roles use, and refuses what the official one refuses.
set -eu

PREFIX="${HOME:-/opt}/miniconda3"
BATCH=0
FORCE=0
while getopts "bfup:" option; do
    case "$option" in
        b) BATCH=1 ;;
        f | u) FORCE=1 ;;
        p) PREFIX="$OPTARG" ;;
        *)
            echo "ERROR: did not recognize option, please try -h" >&2
            exit 1
            ;;
    esac
done
if [ "$BATCH" = 0 ]; then
    echo "ERROR: the stand-in installs in batch mode (-b) only" >&2
    exit 1
fi
if [ "$FORCE" = 0 ] && [ -e "$PREFIX" ]; then
    echo "ERROR: File or directory already exists: '$PREFIX'" >&2
    echo "If you want to update an existing installation, use the -u option." >&2
    exit 1
fi
mkdir -p "$PREFIX"
PREFIX=$(cd "$PREFIX" && pwd)
echo "PREFIX=$PREFIX"
echo "Unpacking payload..."
payload=$(($(grep -anm 1 '^@@END_HEADER@@' "$0" | cut -d: -f1) + 1))
tail -n "+$payload" "$0" | tar -xzf - -C "$PREFIX" --no-same-owner
# The one path that has to be known: programs start with the interpreter of this prefix.
sed -i "1s|@PREFIX@|$PREFIX|" "$PREFIX/bin/conda" "$PREFIX/bin/pip"
sed -i "s|@PREFIX@|$PREFIX|" "$PREFIX/etc/profile.d/conda.sh"
mkdir -p "$PREFIX/envs" "$PREFIX/pkgs"
date '+==> %Y-%m-%d %H:%M:%S <==' >>"$PREFIX/conda-meta/history"
echo "installation finished."
exit 0
# shellcheck disable=SC2317 # not a command: where the archive begins
@@END_HEADER@@
