# shellcheck disable=SC2034 # what is set here is read by those that source this
# Sourced by the scripts of this folder: settings, gcloud calls that are printed before they run,
# and one line for an error. Runs on a laptop; kept to what the bash 3.2 of macOS knows.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
POLL_SECONDS=${TPU_POLL_SECONDS:-30}
export DRY=${DRY:-false}
WORK=$(mktemp -d)
SAID=$WORK/said # what the last gcloud call wrote to stderr
trap 'rm -rf "$WORK"' EXIT

note() { echo "$(date +%H:%M:%S) $*" >&2; }

die() {
  echo "error: $*" >&2
  exit 2
}

shared_flag() {
  case $1 in
    --help) echo "$HELP" && exit ;;
    --dry-run) DRY=true ;;
    *) die "unknown word $1 (see --help)" ;;
  esac
}

settings() { # reads and checks the settings; sets CHIPS, RUNTIME_VERSION, REMEMBERED, flags WHERE
  local file=${TPU_SETTINGS:-$HERE/settings.sh} name missing='' cores=1 runtime
  [[ -r $file ]] || die "settings file $file cannot be read"
  # shellcheck source=settings.sh
  source "$file"
  for name in PROJECT ZONE NAME ACCELERATOR_TYPE SPOT BUCKET; do
    [[ -n ${!name:-} ]] || missing="$missing $name"
  done
  [[ -z $missing ]] || die "not set:$missing; fill in $file"
  [[ $SPOT == true || $SPOT == false ]] || die "SPOT=$SPOT must be true or false; see $file"
  [[ $BUCKET == gs://?* ]] || die "BUCKET=$BUCKET must begin with gs://; see $file"
  case $ACCELERATOR_TYPE in
    v4-[1-9]*) runtime=tpu-ubuntu2204-base cores=2 ;; # these two count TensorCores, not chips
    v5p-[1-9]*) runtime=v2-alpha-tpuv5 cores=2 ;;
    v5litepod-[1-9]*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-[1-9]*) runtime=v2-alpha-tpuv6e ;;
    *) die "unknown ACCELERATOR_TYPE=$ACCELERATOR_TYPE" \
      "(known: v4-N, v5litepod-N for v5e, v5p-N, v6e-N, e.g. v5litepod-8); see $file" ;;
  esac
  [[ ${ACCELERATOR_TYPE#*-} != *[!0-9]* ]] || die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: no number"
  CHIPS=$((${ACCELERATOR_TYPE#*-} / cores))
  REMEMBERED=$(dirname "$file")/.$NAME.commit # of the last setup; not after tpu/delete
  RUNTIME_VERSION=${RUNTIME_VERSION:-$runtime}
  WHERE=(--project="$PROJECT" --zone="$ZONE" --quiet)
  $DRY || command -v gcloud >/dev/null ||
    die "gcloud not found: install the Google Cloud CLI, then run gcloud auth login"
}

call() { # runs gcloud with these words, printed first (once, where it is repeated)
  local line
  line="+ gcloud$(printf ' %q' "$@")"
  grep -qxF -- "$line" "$WORK/printed" 2>/dev/null || echo "$line" | tee -a "$WORK/printed" >&2
  if $DRY; then
    return
  elif [[ $3 == tpu-vm ]] && ${LOUD:-true}; then # minutes long: show what it says meanwhile
    { gcloud "$@" 2>&1 >&3 3>&- </dev/null | tee "$SAID" >&2; } 3>&1
  else
    gcloud "$@" 2>"$SAID" </dev/null
  fi
}

must() { call "$@" || die "$(why)"; }

why() { # the reason why the last call failed, in one line with the way out
  local line workers
  if line=$(grep -m1 '^refused: ' "$SAID"); then # said by tpu/worker
    echo "${line#refused: }"
  elif grep -Eqi 'active account|auth login|reauthenticat' "$SAID"; then
    echo "not logged in: run gcloud auth login"
  elif grep -qi 'quota' "$SAID"; then
    echo "quota refused for $ACCELERATOR_TYPE in $ZONE (SPOT=$SPOT): $(told); ask for Cloud TPU" \
      "quota in the console, or set another ZONE, SPOT or ACCELERATOR_TYPE"
  elif grep -Eqi 'SERVICE_DISABLED|has not been used in project' "$SAID"; then
    echo "the Cloud TPU API is off: run gcloud services enable tpu.googleapis.com" \
      "--project=$PROJECT"
  elif grep -Eqi 'PERMISSION_DENIED|does not have permission' "$SAID"; then
    echo "permission refused: $(told); your account needs the role TPU Admin in $PROJECT"
  elif grep -qi 'NOT_FOUND' "$SAID"; then
    echo "no TPU $NAME in $ZONE: run tpu/create"
  else
    workers=$(sed -n 's/.*on worker \([0-9]*\) failed.*/\1/p' "$SAID" | sort -n)
    [[ -n $workers ]] || # those that ssh tried to reach more than once
      workers=$(sed -n 's/.*connect to worker \([0-9]*\).*/\1/p' "$SAID" | sort -n | uniq -d)
    if [[ -n $workers ]]; then
      echo "worker $(xargs <<<"$workers") failed or was not reached: see tpu/status and try again" \
        "(for several workers, ssh-add ~/.ssh/google_compute_engine first)"
    else
      echo "gcloud failed: $(told)"
    fi
  fi
}

told() { # gcloud's own words, in one line
  { grep -A2 '^ERROR' "$SAID" || tail -n 3 "$SAID"; } | tr -s '\n\r ' ' ' | cut -c 1-300
}

queued_state() { # ACTIVE, WAITING_FOR_RESOURCES, ...; NONE where there is no such resource
  call compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)' && return
  grep -q NOT_FOUND "$SAID" || die "$(why)"
  echo NONE
}

failure() { # why the queued resource is FAILED, in the words of the service
  call compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.failedData.error.message)' | head -n 1
}

call_workers() { # WHICH WORD...: tpu/worker with these words on worker WHICH, or on all
  local bare="refused: \$HOSTNAME is not set up: run tpu/setup" kernels=${DISTILBERT_JAX_KERNELS:-}
  call compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --command="\
[ -e code/ready ] || { echo \"$bare\" >&2; exit 2; }; \
${kernels:+$(printf 'DISTILBERT_JAX_KERNELS=%q ' "$kernels")}bash code/tpu/worker$(printf ' %q' "${@:2}")"
}

on_workers() { call_workers "$@" || die "$(why)"; }

committed() { # the commit that the workers get
  git -C "$HERE" rev-parse -q --verify "${COMMIT:-HEAD}^{commit}" ||
    die "no commit ${COMMIT:-HEAD}: the committed code is what the workers get; use a git clone"
}
