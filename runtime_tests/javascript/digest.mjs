// Digests of logits: see runtime_tests/worker/digest.py, whose arithmetic this repeats in double precision.

/**
 * @param {Float32Array} logits [n, vocab]
 * @param {Int32Array} targets the n tokens that followed
 * @param {number} top how many tokens of each position to name
 * @returns arrays of a reply: top_ids, top_logp [n, top], rest_logp, loss [n]
 */
export function digestOf(logits, targets, top) {
  const n = targets.length;
  const vocab = logits.length / n;
  const k = Math.min(top, vocab);
  const ids = new Int32Array(n * k);
  const logp = new Float32Array(n * k);
  const rest = new Float32Array(n);
  const loss = new Float32Array(n);
  for (let row = 0; row < n; row++) {
    const values = logits.subarray(row * vocab, (row + 1) * vocab);
    let max = -Infinity;
    for (const value of values) if (value > max) max = value;
    let sum = 0;
    for (const value of values) sum += Math.exp(value - max);
    const shift = max + Math.log(sum);
    const order = Uint32Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
    for (let i = 0; i < k; i++) {
      ids[row * k + i] = order[i];
      logp[row * k + i] = values[order[i]] - shift;
    }
    let others = 0;
    for (let i = k; i < vocab; i++) others += Math.exp(values[order[i]] - shift);
    rest[row] = Math.log(others);
    loss[row] = shift - values[targets[row]];
  }
  return {
    top_ids: { data: ids, shape: [n, k] },
    top_logp: { data: logp, shape: [n, k] },
    rest_logp: { data: rest, shape: [n] },
    loss: { data: loss, shape: [n] },
  };
}
