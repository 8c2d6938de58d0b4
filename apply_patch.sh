#!/usr/bin/env bash
# Applies 0001-on-policy-distillation.patch to a VERL, or removes it. See --help.
set -euo pipefail
unset CDPATH

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
patch_file=$here/0001-on-policy-distillation.patch
verifier=$here/scripts/verify_patch.py

# scripts/check_versions.py reads both lines. Releases are checked whole; the branch moves, so it was checked at a commit.
supported_releases="0.9.0 0.9.1"
supported_branch="0.10.0.dev"

usage() {
    cat <<HELP
Usage: ./apply_patch.sh [OPTIONS] [TARGET]

Adds on-policy distillation to the VERL in TARGET, a directory with verl/ in it: a git checkout, an unpacked source
tree or a site-packages directory. Without TARGET: the VERL that Python imports.

  --check        say what would happen; change nothing
  --reverse      take the patch out again: every file is then as it was, byte for byte
  --3way         in a git checkout, merge with changes of your own in the same files; also with --reverse
  --any-version  try it on a version other than VERL ${supported_releases// /, } and $supported_branch
  --no-verify    do not run scripts/verify_patch.py afterwards
  -h, --help     this text

PYTHON=... names the Python that finds VERL and verifies the patch.

The whole patch is applied or nothing is changed, whatever goes wrong. A tree that has the patch is left as it is.
In a git checkout the files that the patch changes must have no uncommitted changes (--3way merges with them); all
other files may be in any state, and neither the index nor the history is touched.

Exit status: 0 done or nothing to do, 1 an error (and an unchanged tree), 2 wrong usage.
HELP
}

is_explained=

say() { echo "apply_patch.sh: $*"; }
die() {
    is_explained=yes
    echo "apply_patch.sh: error: $*" >&2
    exit 1
}
wrong_usage() {
    echo "apply_patch.sh: error: $*; see --help" >&2
    exit 2
}

# ---------------------------------------------------------------------------------------------------------------------
# the target

# The names to try, one a line.
pythons() { if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; else printf 'python3\npython\n'; fi; }

# Where a Python would import VERL from, without importing it.
verl_of() {
    "$1" -c '
import importlib.util, os, sys
spec = importlib.util.find_spec("verl")
if spec is None or not spec.origin:
    sys.exit(1)
print(os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))))
' 2>/dev/null
}

python_with_verl() {
    local candidate
    while IFS= read -r candidate; do
        if verl_of "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done < <(pythons)
    die "${PYTHON:-python3} has no VERL; name its directory (./apply_patch.sh TARGET) or another Python (PYTHON=...)"
}

# The directory that has verl/ in it; the package itself, as in .../site-packages/verl, is taken for it.
resolve_target() {
    local tree=$1
    [ -d "$tree" ] || die "'$tree' is not a directory"
    tree=$(cd "$tree" && pwd -P) || die "$1 cannot be entered"
    if [ ! -e "$tree/verl/__init__.py" ] && [ "${tree##*/}" = verl ] && [ -e "$tree/version/version" ]; then
        tree=${tree%/verl}
    fi
    [ -f "$tree/verl/__init__.py" ] || die "$1 has no verl/__init__.py in it: not a VERL tree"
    echo "$tree"
}

find_version() {
    local file found=''
    if [ -f "$target/verl/version/version" ]; then
        found=$(tr -d '[:space:]' <"$target/verl/version/version")
    fi
    for file in "$target"/verl-[0-9]*.dist-info/METADATA "$target"/verl.egg-info/PKG-INFO "$target"/PKG-INFO; do
        if [ -n "$found" ] || [ ! -f "$file" ]; then continue; fi
        found=$(sed -n '/^Version:/{s/^Version: *//p;q;}' "$file" | tr -d '[:space:]')
    done
    echo "${found:-unknown}"
}

check_version() {
    local release
    case $version in "$supported_branch"*) return ;; esac
    for release in $supported_releases; do
        # What follows a plus is the packager's: 0.9.1+local is 0.9.1.
        [ "${version%%+*}" != "$release" ] || return 0
    done
    [ -z "$any_version" ] || { say "VERL $version: not a version that the patch was checked with"; return 0; }
    die "$target has VERL $version; the patch is for ${supported_releases// /, } and $supported_branch.
Nothing was changed. --any-version tries it all the same."
}

# ---------------------------------------------------------------------------------------------------------------------
# the patch

changed_files() { sed -n 's,^--- a/,,p' "$patch_file"; }
new_files() { awk '/^--- \/dev\/null$/ { getline; sub(/^\+\+\+ b\//, ""); print }' "$patch_file"; }

# git without any repository: in one, git apply would look at its settings, and skip, without a word, what lies outside
# of the directory it is run in.
git_apply() (
    cd "$target"
    unset GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
    GIT_DIR=/nonexistent git -c core.autocrlf=false apply --whitespace=nowarn "$@" "$patch_file"
)

# patch(1) where there is no git. Without fuzz, as git: every line of context has to be there.
patch_apply() (
    cd "$target"
    patch -p1 --force --fuzz=0 --no-backup-if-mismatch --reject-file=- "$@" <"$patch_file"
)

# apply_tool [--check] [--reverse]: what either tool says goes to stdout and stderr.
apply_tool() {
    if [ "$tool" = git ]; then
        git_apply "$@"
        return
    fi
    local argument
    for argument in "$@"; do
        shift
        case $argument in
        --check) set -- "$@" --dry-run ;;
        *) set -- "$@" "$argument" ;;
        esac
    done
    patch_apply "$@"
}

is_patched() { apply_tool --check --reverse >/dev/null 2>&1; }
is_unpatched() { apply_tool --check >/dev/null 2>&1; }

is_checkout() { [ "$tool" = git ] && [ -e "$target/.git" ] && git_here rev-parse --git-dir >/dev/null 2>&1; }

# git in the target's own repository, whatever repository this script is called from.
git_here() (
    unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
    git -C "$target" --no-optional-locks "$@"
)

# ---------------------------------------------------------------------------------------------------------------------
# what is refused

check_uncommitted() {
    local dirty file files=()
    is_checkout || return 0
    while IFS= read -r file; do files+=("$file"); done < <(changed_files)
    dirty=$(git_here status --porcelain --untracked-files=no -- "${files[@]}")
    [ -z "$dirty" ] || die "files that the patch changes have uncommitted changes:
$dirty
Nothing was changed. Commit or stash them, or merge with --3way."
}

# The package's modules are the patch's new files.
check_pip_package() {
    local found
    found=$(find "$target" -maxdepth 1 -name 'verl_on_policy_distillation-*.dist-info')
    [ -z "$found" ] || die "$target has the pip package verl-on-policy-distillation, whose files are also in the patch.
Nothing was changed. Remove it first: ${python:-python3} -m pip uninstall verl-on-policy-distillation"
}

count() { "$@" | wc -l | tr -d ' '; }

new_files_there() {
    local file
    while IFS= read -r file; do
        if [ -e "$target/$file" ]; then echo "$file"; fi
    done < <(new_files)
}

check_other_patch() {
    local present
    present=$(count new_files_there)
    [ "$present" -eq 0 ] || die "$present of the $(count new_files) new files are in $target already:
this patch with changes made since, another version of it, or the rest of one after VERL was installed anew.
Nothing was changed. Take that one out first (--reverse, with the apply_patch.sh it came from), or start from a fresh VERL."
}

# The files that stand in the way, one a line. git says "error: FILE: patch does not apply" or another reason; patch(1)
# says "checking file FILE" and then what failed.
conflicts() {
    { apply_tool --check "$@" 2>&1 || true; } | awk '
        /^error: patch failed: / || /: already exists in working directory$/ { next }
        sub(/^error: /, "") { sub(/: patch does not apply$/, ""); print "  " $0; next }
        sub(/^(checking|patching) file /, "") { file = $0; next }
        /FAILED|find file to patch/ && !seen[file]++ { print "  " file }
    '
}

# check_conflicts [--reverse]
check_conflicts() {
    local what="does not apply to" advice="differ from VERL's"
    ! apply_tool --check "$@" >/dev/null 2>&1 || return 0
    conflicts "$@" >&2
    if [ -n "$reverse" ]; then
        what="cannot be taken out of"
        advice="were changed after it was applied, or have another version of it"
    fi
    if is_checkout; then advice="$advice. Try --3way, which merges"; fi
    die "the patch $what $target (VERL $version); nothing was changed.
The files above $advice."
}

# Both tools check every hunk before they write, but find out only while writing that they may not.
check_writable() {
    local file directory
    while IFS= read -r file; do
        directory=$target/$(dirname "$file")
        while [ ! -d "$directory" ]; do directory=$(dirname "$directory"); done
        [ -w "$directory" ] || die "$directory is not writable; nothing was changed"
        [ ! -e "$target/$file" ] || [ -w "$target/$file" ] ||
            die "$target/$file is not writable; nothing was changed"
    done < <(changed_files && new_files)
}

# ---------------------------------------------------------------------------------------------------------------------
# all or nothing

backup=
is_undone_at_exit=

keep_backup() {
    local file
    backup=$(mktemp -d)
    while IFS= read -r file; do
        [ -e "$target/$file" ] || continue
        mkdir -p "$backup/$(dirname "$file")"
        cp -p "$target/$file" "$backup/$file"
    done < <(changed_files && new_files)
    is_undone_at_exit=yes
}

put_back() {
    local file failed=''
    while IFS= read -r file; do
        if [ ! -e "$backup/$file" ]; then
            rm -f "$target/$file" || failed=yes
        elif ! cmp -s "$backup/$file" "$target/$file"; then
            # A file of its own: package managers link installed files into their caches.
            { rm -f "$target/$file" && mkdir -p "$target/$(dirname "$file")" && cp -p "$backup/$file" "$target/$file"; } ||
                failed=yes
        fi
    done < <(changed_files && new_files)
    remove_leftovers
    if [ -n "$failed" ]; then
        echo "apply_patch.sh: NOT everything could be undone; the files as they were are in $backup" >&2
        backup=
    fi
}

# Called at exit, by any way: an error, a signal, or success, which has cleared is_undone_at_exit.
clean_up() {
    local status=$?
    if [ -n "$is_undone_at_exit" ]; then put_back; fi
    [ -z "$backup" ] || rm -rf "$backup"
    [ -z "$merge" ] || rm -rf "$merge"
    [ "$status" -eq 0 ] || [ -n "$is_explained" ] ||
        echo "apply_patch.sh: error: stopped (status $status); nothing was changed, or it was undone" >&2
}

# What Python compiled from the new files, and the directories that only they needed.
remove_leftovers() {
    local file directory name
    while IFS= read -r file; do
        [ ! -e "$target/$file" ] || continue
        directory=$target/$(dirname "$file")
        name=$(basename "$file")
        rm -f "$directory/__pycache__/${name%.py}".*.pyc
        rmdir "$directory/__pycache__" 2>/dev/null || true
        while rmdir "$directory" 2>/dev/null; do directory=$(dirname "$directory"); done
    done < <(new_files)
}

# ---------------------------------------------------------------------------------------------------------------------
# --3way

merge=

# git in the checkout with a place of its own for new objects.
git_with_objects() (
    unset GIT_DIR GIT_WORK_TREE GIT_PREFIX
    cd "$target"
    objects=$(git rev-parse --git-path objects)
    case $objects in /*) ;; *) objects=$PWD/$objects ;; esac
    export GIT_ALTERNATE_OBJECT_DIRECTORIES=$objects GIT_OBJECT_DIRECTORY=$merge/objects
    git -c core.autocrlf=false "$@"
)

# ... and with a copy of its index to which the files of the work tree are added: the checkout's own stays as it is.
git_merge() { GIT_INDEX_FILE=$merge/index git_with_objects "$@"; }

start_merge() {
    local index file
    is_checkout || die "--3way needs a git checkout of VERL, which $target is not; nothing was changed"
    index=$(git_here rev-parse --git-path index)
    case $index in /*) ;; *) index=$target/$index ;; esac
    rm -rf "$merge"
    merge=$(mktemp -d)
    mkdir "$merge/objects"
    [ ! -e "$index" ] || cp "$index" "$merge/index"
    while IFS= read -r file; do
        [ ! -e "$target/$file" ] || git_merge add -- "$file"
    done < <(changed_files && new_files)
    # Without VERL's own blobs git merges nothing, but still takes files that need no merge.
    [ -z "$reverse" ] || make_patched_blobs 2>/dev/null || true
}

# What a merge of --reverse starts from: VERL's own files with the patch, which no repository has.
make_patched_blobs() (
    awk '/^diff --git / { file = substr($3, 3) }
        /^index / && !/^index 0+\.\./ { split($2, blob, /\.\./); print "100644 " blob[1] "\t" file }' "$patch_file" |
        GIT_INDEX_FILE=$merge/patched git_with_objects update-index --index-info
    GIT_INDEX_FILE=$merge/patched git_with_objects apply --cached --whitespace=nowarn "$patch_file"
)

# check_merge [--reverse]
check_merge() {
    local said
    start_merge
    if ! said=$(git_merge apply --3way --cached --whitespace=nowarn "$@" "$patch_file" 2>&1); then
        echo "$said" | sed -n -e 's/^U /  conflict: /p' -e 's/^error: /  /p' >&2
        die "the patch and the changes in $target do not merge by themselves; nothing was changed.
To have both written into the files and resolve the conflicts by hand, commit your changes and run:
  git -C $(printf %q "$target") apply --3way $* $(printf %q "$patch_file")
If blobs are missing, fetch VERL's tag v${supported_releases##* } into the checkout first."
    fi
}

undone="writing failed; what was written has been undone"

# git and patch(1) write a changed file anew, with the mode and the owner of a new one.
restore_modes() {
    local file
    while IFS= read -r file; do
        if [ ! -e "$target/$file" ] || [ ! -e "$backup/$file" ]; then continue; fi
        cp "$target/$file" "$backup/written"
        cp -p "$backup/$file" "$target/$file"
        cat "$backup/written" >"$target/$file"
    done < <(changed_files)
}

# write_patch [--reverse], after everything has been checked
write_patch() {
    keep_backup
    # Who can read VERL's files must be able to read the new ones, whatever the umask of who applies the patch.
    umask "$(printf '%04o' $((0$(umask) & 022)))"
    if [ -n "$three_way" ]; then
        start_merge
        git_merge apply --3way --whitespace=nowarn "$@" "$patch_file" 2>/dev/null || die "$undone"
    else
        apply_tool "$@" >/dev/null || die "$undone"
    fi
    restore_modes || die "$undone"
}

# ---------------------------------------------------------------------------------------------------------------------
# the two directions

# The Python that VERL was found with, or that the user names, or that a site-packages directory belongs to.
python_for_target() {
    local environment=${target%/lib/python3*/site-packages} candidate
    if [ -z "$python" ] && [ -z "${PYTHON:-}" ] && [ "$environment" != "$target" ]; then
        candidate=$environment/bin/python
        if [ -x "$candidate" ]; then
            echo "$candidate"
            return
        fi
    fi
    while IFS= read -r candidate; do
        if command -v "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done < <(if [ -n "$python" ]; then echo "$python"; else pythons; fi)
}

verify() {
    local interpreter status=0
    interpreter=$(python_for_target)
    if [ ! -f "$verifier" ] || [ -z "$interpreter" ]; then
        say "not verified: ${verifier##*/} or a Python is missing"
        return
    fi
    "$interpreter" "$verifier" "$target" || status=$?
    case $status in
    0) ;;
    3) say "not verified in full, as $interpreter lacks what is named above. With the Python that trains:
  PYTHON $(printf '%q %q' "$verifier" "$target")" ;;
    *) die "the patched VERL does not work, so the patch was taken out again. --no-verify leaves it in." ;;
    esac
}

next_steps() {
    cat <<NEXT
Next: add these to a VERL command that runs PPO or GRPO
  actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation teacher.model.path=PATH_OF_THE_TEACHER
Remove it (before VERL is upgraded or uninstalled):
  $(printf '%q --reverse %q' "$here/apply_patch.sh" "$target")
NEXT
}

apply() {
    local message
    if is_patched; then
        say "$target has the patch already; nothing to do"
        return
    fi
    check_version
    check_pip_package
    check_other_patch
    if [ -n "$three_way" ]; then
        check_merge
    else
        check_uncommitted
        check_conflicts
    fi
    check_writable
    message="$(count changed_files) files changed, $(count new_files) added"
    if [ -n "$check" ]; then
        say "the patch applies to VERL $version in $target ($message); nothing was changed"
        return
    fi
    write_patch
    say "patched VERL $version in $target ($message)"
    [ -n "$no_verify" ] || verify
    is_undone_at_exit=''
    is_explained=yes
    next_steps
}

reverse() {
    if is_unpatched; then
        say "$target does not have the patch; nothing to do"
        return
    fi
    if [ -n "$three_way" ]; then check_merge --reverse; else check_conflicts --reverse; fi
    check_writable
    if [ -n "$check" ]; then
        say "the patch can be taken out of VERL $version in $target; nothing was changed"
        return
    fi
    write_patch --reverse
    is_undone_at_exit=''
    is_explained=yes
    remove_leftovers
    say "took the patch out of VERL $version in $target"
}

check='' reverse='' three_way='' any_version='' no_verify='' targets=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --check) check=yes ;;
    --reverse | -R) reverse=yes ;;
    --3way) three_way=yes ;;
    --any-version) any_version=yes ;;
    --no-verify) no_verify=yes ;;
    -*) wrong_usage "unknown option $1" ;;
    *) targets+=("$1") ;;
    esac
    shift
done
[ ${#targets[@]} -le 1 ] || wrong_usage "more than one TARGET"

[ -s "$patch_file" ] || die "$patch_file is missing"
if command -v git >/dev/null; then tool="git"; elif command -v patch >/dev/null; then tool="patch"; else
    die "neither git nor patch is installed; nothing was changed"
fi

python=''
if [ ${#targets[@]} -eq 0 ]; then
    python=$(python_with_verl)
    targets=("$(verl_of "$python")")
fi
target=$(resolve_target "${targets[0]}")
version=$(find_version)

trap clean_up EXIT
trap 'exit 130' INT TERM HUP
if [ -n "$reverse" ]; then reverse; else apply; fi
