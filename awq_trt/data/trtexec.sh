
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
  --dry-run    print the commands and put their inputs into the folder, but run nothing
END
}

# fits CAPACITY CHUNK: the rules of a KV cache of fixed capacity
fits() {
    ((past + tokens <= $1)) || fail "--past $past --tokens $tokens: the cache has room for $1 tokens"
    ((tokens <= $2 - past % $2)) ||
        fail "--past $past --tokens $tokens: no call may cross a multiple of $2 tokens, so at most $(($2 - past % $2))"
}

# input NAME FILE START BYTES: an input whose values are at START in the file beside the plan
input() {
    dd if="$values" of="$profile.$2.bin" iflag=skip_bytes,count_bytes skip="$3" count="$4" status=none
    inputs+=${inputs:+,}$1:$profile.$2.bin
}

# time_profile NAME INDEX
time_profile() {
    local profile=$1 batch=1 tokens=1 past=0 inputs='' shapes='' option value low default high words
    for option in batch tokens past; do
        [[ ${ranges[$profile.$option]-} ]] || continue
        read -r low default high <<<"${ranges[$profile.$option]}"
        value=${given[$option]-$default}
        ((low < high)) || value=$low # an option that leaves no choice is ignored
        ((low <= value && value <= high)) || fail "--$option $value: $profile takes $low to $high"
        printf -v "$option" %s "$value"
    done
    set_inputs
    words=("$tool" "--loadEngine=$plan" "${flags[@]}" "--useProfile=$2" "--shapes=$shapes")
    [[ $inputs ]] && words+=("--loadInputs=$inputs")
    [[ $plugin ]] && words+=("--dynamicPlugins=$plugin")
    words+=("--device=${given[device]-0}" "--duration=${given[seconds]-10}")
    words+=("--exportTimes=$profile.times.json" "--exportProfile=$profile.layers.json" "${more[@]}")
    printf '\n# %s\n(cd %q && %s)\n' "$profile" "$PWD" "${words[*]@Q}"
    [[ $dry_run ]] || "${words[@]}"
}

declare -A given=()
chosen=() more=() dry_run='' here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
while (($#)); do
    case $1 in
    --device | --seconds | --batch | --tokens | --past)
        [[ " .device .seconds ${!ranges[*]} " == *".${1#--} "* ]] || fail "the plan has no $1; see --help"
        [[ ${2-} =~ ^[0-9]{1,9}$ ]] || fail "$1 needs a number"
        given[${1#--}]=$((10#$2))
        shift
        ;;
    --output)
        output=${2:?"--output needs a folder"}
        shift
        ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
        usage
        exit
        ;;
    --)
        more=("${@:2}")
        break
        ;;
    *)
        [[ " ${profiles[*]} " == *" $1 "* ]] || fail "$1 is neither a profile (${profiles[*]}) nor an option; see --help"
        chosen+=("$1")
        ;;
    esac
    shift
done
for file in "$plan" "$values"; do
    [[ -f $here/$file ]] || fail "$here/$file is missing: keep it beside this script"
done
[[ ! $plugin || -f $plugin ]] || fail "$plugin is missing, and the plan needs it: give its path in AWQ_TRT_PLUGIN"
[[ $dry_run ]] || command -v "$tool" >/dev/null ||
    fail "$tool is not installed or not on PATH (it comes with $package): give its path in TRTEXEC"
[[ $tool != */* ]] || tool=$(realpath -- "$tool")
[[ ! $plugin ]] || plugin=$(realpath -- "$plugin")
plan=$here/$plan values=$here/$values
if ! mkdir -p -- "$output" || ! cd -- "$output"; then
    fail "cannot write to $output"
fi
for index in "${!profiles[@]}"; do
    if ((!${#chosen[@]})) || [[ " ${chosen[*]} " == *" ${profiles[index]} "* ]]; then
        time_profile "${profiles[index]}" "$index"
    fi
done
