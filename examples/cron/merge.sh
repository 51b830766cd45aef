#!/bin/bash
# For cron, until it is done: */15 * * * * cd /data && ./merge.sh >>merge.log 2>&1
# A run that cron starts while another one is at it ends at once; so does one after the merge is complete.
set -uo pipefail

streammerge merge recipe.yaml merged --memory 1GiB --resume
code=$?
case $code in
  0) exec streammerge verify merged ;;
  3) echo "does not fit at the moment; cron tries again" ;;
  4) echo "another run is at it" ;;
  130) echo "interrupted; cron goes on with it" ;;
  *) echo "failed with exit code $code, see above" >&2 ;;
esac
exit "$code"
