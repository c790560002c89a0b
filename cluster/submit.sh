#!/usr/bin/env bash
# The command on the front page, with the checks of `python -m cluster.submit`:
#
#   bash cluster/submit.sh pretrain kind=bold shards=s3://brains/shards run.folder=s3://runs/bold ...
#
# RAY_API_SERVER_ADDRESS: the head's job server, http://127.0.0.1:8265 through an ssh tunnel if not set.
# RAY_AUTH_MODE=token with ~/.ray/auth_token (or RAY_AUTH_TOKEN_PATH) where the cluster wants a token.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m cluster.submit "$@"
