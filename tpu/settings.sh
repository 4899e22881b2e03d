# shellcheck disable=SC2034 # read by common.sh
# What the scripts of this folder work on. Fill this in, or keep several such files and name one:
# TPU_SETTINGS=my-v4.sh tpu/create
PROJECT=            # id of the Google Cloud project
ZONE=               # where the TPU is granted, e.g. us-west4-a
NAME=distil         # of the TPU, and of the run's folder in the bucket
ACCELERATOR_TYPE=   # v4-N, v5litepod-N (v5e), v5p-N or v6e-N, e.g. v5litepod-8
RUNTIME_VERSION=    # empty: the one for ACCELERATOR_TYPE
SPOT=true           # true: cheaper, may be taken away (tpu/run --keep-alive); false: on demand
BUCKET=             # gs://NAME, in the region of ZONE: checkpoints, student, report
