# shellcheck shell=sh
# The shell function of the Miniconda stand-in: `conda activate` and `conda deactivate` for people.
# What the real one does that a test can notice: PATH, CONDA_PREFIX, CONDA_DEFAULT_ENV, activation hooks.
export CONDA_EXE='@PREFIX@/bin/conda'

__conda_standin_deactivate() {
    [ -n "${CONDA_PREFIX:-}" ] || return 0
    PATH=$(printf '%s' "$PATH" | sed "s|^$CONDA_PREFIX/bin:||")
    export PATH
    unset CONDA_PREFIX CONDA_DEFAULT_ENV
}

__conda_standin_activate() {
    __conda_standin_prefix=$("$CONDA_EXE" standin-prefix "${1:-base}") || return 1
    __conda_standin_deactivate
    export CONDA_PREFIX="$__conda_standin_prefix" CONDA_DEFAULT_ENV="${1:-base}"
    export PATH="$CONDA_PREFIX/bin:$PATH"
    unset __conda_standin_prefix
    for __conda_standin_hook in "$CONDA_PREFIX"/etc/conda/activate.d/*.sh; do
        [ -r "$__conda_standin_hook" ] && . "$__conda_standin_hook"
    done
    unset __conda_standin_hook
}

conda() {
    case "${1:-}" in
        activate)
            shift
            __conda_standin_activate "$@"
            ;;
        deactivate) __conda_standin_deactivate ;;
        *) "$CONDA_EXE" "$@" ;;
    esac
}
