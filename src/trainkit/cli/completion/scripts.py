"""The completion scripts of the shells. They ask `trainkit -sc query=SHELL` and show none of its errors."""

from __future__ import annotations

BASH = """\
if [[ "$(complete -p @NAME@ 2> /dev/null)" != *_trainkit_completion* ]]; then
    _TRAINKIT_OLD_COMPLETION="$(complete -p @NAME@ 2> /dev/null)"
fi
_trainkit_completion() {
    local program="${COMP_WORDS[0]/#\\~/$HOME}" line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("$line")
    done < <(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" COMP_WORD="$2" "$program" -sc query=bash 2> /dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=./] ]]; then
        compopt -o nospace 2> /dev/null
    fi
    return 0
}
complete -F _trainkit_completion @NAME@
"""
BASH_UNINSTALL = """\
complete -r @NAME@ 2> /dev/null
unset -f _trainkit_completion 2> /dev/null
eval "${_TRAINKIT_OLD_COMPLETION-}"
unset _TRAINKIT_OLD_COMPLETION
"""
ZSH = """\
if (( ! $+functions[compdef] )); then
    autoload -Uz compinit && compinit -i
fi
_trainkit_completion() {
    local program="${(Q)words[1]}" line="${(j: :)words[1,CURRENT-1]} $QIPREFIX$PREFIX"
    local -a found
    found=("${(@f)$(COMP_LINE="$line" "${program/#\\~/$HOME}" -sc query=zsh 2> /dev/null)}")
    found=("${(@)found:#}")
    compadd -S '' -- "${(@M)found:#*[=./]}"
    compadd -- "${(@)found:#*[=./]}"
}
compdef _trainkit_completion @NAME@
"""
ZSH_UNINSTALL = """\
compdef -d @NAME@
unfunction _trainkit_completion 2> /dev/null
"""
FISH = """\
function __trainkit_completion
    set -l words (commandline -cpo)
    set -l program (string replace -r '^~' $HOME -- $words[1])
    set -lx COMP_LINE (commandline -cp | string collect)
    command $program -sc query=fish 2> /dev/null
end
complete -c @NAME@ -e
complete -c @NAME@ -f -a '(__trainkit_completion)'
"""
FISH_UNINSTALL = """\
complete -c @NAME@ -e
functions -e __trainkit_completion
"""
SCRIPTS = {
    "install": {"bash": BASH, "zsh": ZSH, "fish": FISH},
    "uninstall": {"bash": BASH_UNINSTALL, "zsh": ZSH_UNINSTALL, "fish": FISH_UNINSTALL},
}
HINTS = {
    "bash": 'eval "$(trainkit -sc install=bash)"',
    "zsh": 'eval "$(trainkit -sc install=zsh)"',
    "fish": "trainkit -sc install=fish | source",
}


def script(action: str, shell: str, name: str) -> str:
    """Return a script.

    Args:
        action: `install` or `uninstall`.
        shell: bash, zsh or fish.
        name: of the command.
    """
    return SCRIPTS[action][shell].replace("@NAME@", name)
