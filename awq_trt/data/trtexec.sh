
# ---- the same in every script

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

usage() {
    cat <<END
$0 [PROFILE ...] [options] [-- more options of $tool]

Profiles: ${profiles[*]}; all of them, one after the other, if none is named. Each leaves the times of every run and of
every layer in the output folder, PROFILE.times.json and PROFILE.layers.json, beside the inputs it ran on.

$numbers
  --seconds N  to measure for (10)
  --device N   GPU (0)
  --output D   folder to write to ($output)
  --dry-run    write the inputs and print the commands, but run nothing
END
}

# number NAME SMALLEST LARGEST DEFAULT: sets the variable NAME; an option that leaves no choice is ignored
number() {
    local value=${given[$1]-$4}
    if (($2 == $3)); then
        value=$2
    elif ((value < $2 || value > $3)); then
        fail "--$1 $value: $profile takes $2 to $3"
    fi
    printf -v "$1" %s "$value"
}

# fits CAPACITY CHUNK: the rules of a KV cache of fixed capacity
fits() {
    ((past + tokens <= $1)) || fail "--past $past --tokens $tokens: the cache has room for $1 tokens"
    ((tokens <= $2 - past % $2)) ||
        fail "--past $past --tokens $tokens: no call may cross a multiple of $2 tokens, so at most $(($2 - past % $2))"
}

# integers INPUT FILE WIDTH COUNT VALUE...: write COUNT integers of WIDTH bytes, the values again and again
integers() {
    local input=$1 file=$profile.$2.bin width=$3 count=$4 block='' value byte i
    shift 4
    for value; do
        for ((i = 0; i < width; i++)); do
            printf -v byte '\\x%02x' $((value >> 8 * i & 255))
            block+=$byte
        done
    done
    { # block has four characters for each byte
        for ((i = 0; i < count / $#; i++)); do printf '%b' "$block"; done
        printf '%b' "${block:0:count % $# * width * 4}"
    } >"$file"
    inputs+=${inputs:+,}$input:$file
}

# tokens_of VOCABULARY: sets ids to token ids from all over it
tokens_of() {
    local i
    ids=()
    for ((i = 0; i < 1024; i++)); do ids+=($((i * 7919 % $1))); done
}

time_profile() {
    local profile=$1 inputs='' shapes='' words word
    "profile_$profile"
    words=("$tool" "--loadEngine=$plan" "${flags[@]}" "--useProfile=$index" "--shapes=$shapes")
    [[ $inputs ]] && words+=("--loadInputs=$inputs")
    [[ $plugin ]] && words+=("--dynamicPlugins=$plugin")
    words+=("--device=${given[device]-0}" "--duration=${given[seconds]-10}")
    words+=("--exportTimes=$profile.times.json" "--exportProfile=$profile.layers.json" "${more[@]}")
    printf '\n# %s\n(cd %q &&' "$profile" "$PWD"
    for word in "${words[@]}"; do
        [[ $word =~ ^[][A-Za-z0-9_./:,=@%+-]+$ ]] && printf ' %s' "$word" || printf ' %q' "$word"
    done
    printf ')\n'
    [[ $dry_run ]] || "${words[@]}"
}

declare -A given=()
chosen=() more=() dry_run='' here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
while (($#)); do
    if [[ " ${profiles[*]} " == *" $1 "* ]]; then
        chosen+=("$1")
    elif [[ $1 == --output ]]; then
        output=${2:?"--output needs a folder"}
        shift
    elif [[ " $options device seconds " == *" ${1#--} "* && $1 == --* ]]; then
        [[ ${2-} =~ ^[0-9]{1,9}$ ]] || fail "$1 needs a number"
        given[${1#--}]=$((10#$2))
        shift
    elif [[ $1 == --dry-run ]]; then
        dry_run=1
    elif [[ $1 == --help || $1 == -h ]]; then
        usage
        exit
    elif [[ $1 == -- ]]; then
        shift
        more=("$@")
        break
    else
        fail "$1 is neither a profile (${profiles[*]}) nor an option; see --help"
    fi
    shift
done
plan=$here/$plan
[[ -f $plan ]] || fail "$plan is missing: keep it beside this script"
[[ ! $plugin || -f $plugin ]] || fail "$plugin is missing, and the plan needs it: give its path in AWQ_TRT_PLUGIN"
[[ $dry_run ]] || command -v "$tool" >/dev/null ||
    fail "$tool is not installed or not on PATH (it comes with $package): give its path in TRTEXEC"
[[ $tool != */* ]] || tool=$(realpath -- "$tool")
[[ ! $plugin ]] || plugin=$(realpath -- "$plugin")
if ! mkdir -p -- "$output" || ! cd -- "$output"; then
    fail "cannot write to $output"
fi
((${#chosen[@]})) || chosen=("${profiles[@]}")
for profile in "${chosen[@]}"; do
    time_profile "$profile"
done
