# Sourced by the proofs beside it.

# What is in a run, without times: they stand in stage.json, in TensorBoard's events and in the report alone. Weights
# are compared by the fingerprints of their bytes, since Orbax's own files hold times too.
contents() {
  (cd "$1" && find . -type f \( -name '*.jsonl' -o -name summary.json -o -name audit.json -o -name report.json \
    -o -name measures.json -o -name fingerprint.json -o -name character.toml \) -print0 | sort -z | xargs -0 sha256sum)
}
