# Sourced by run.sh, babysit.sh and gke.sh: checks the charjax command that stands behind --.
((${#rest[@]})) || fail 'what is to be run? give it behind --, as in: -- run --config=configs/llama3_8b.py --workdir=/mnt/runs/8b'
[[ ${rest[0]} =~ ^(run|messages|replies|rankings|preference|baseline|policy|evaluation|behaviour|report)$ ]] ||
  fail "behind -- comes run, or one of its stages, and not ${rest[0]}: -- run --config=... --workdir=..."
[[ " ${rest[*]}" == *' --config='* ]] || fail 'charjax needs --config=FILE.py behind --'
[[ " ${rest[*]}" == *' --workdir=/'* || " ${rest[*]}" == *' --workdir=gs://'* ]] ||
  fail 'charjax needs --workdir= behind --: a folder that all workers share, from / on'
