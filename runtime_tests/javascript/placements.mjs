// Where ONNX Runtime puts the nodes of a graph. What a provider cannot run goes to the CPU provider without a word, and
// the JavaScript API does not tell. Its verbose log does (VerifyEachNodeIsAssignedToAnEp in onnxruntime/core/framework/
// session_state.cc): a line "Node(s) placed on [PROVIDER]. Number of nodes: N", or "All nodes placed on …", then a line
// "  OPERATOR (NAME)" for each node. In WebAssembly the log is written to the console.

const HEADING = /(?:Node\(s\)|All nodes) placed on \[(\w+)\]/;
const NODE = /VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \((.*)\)\s*$/;
const METHODS = ['error', 'warn', 'log', 'info', 'debug'];

/** [result of `make`, {provider: [[operator, name], …]}]; `make` creates a session of log severity 0. */
export async function withPlacements(make) {
  const before = Object.fromEntries(METHODS.map((name) => [name, console[name]]));
  const placements = {};
  let provider = null;
  const take = (...parts) => {
    const line = parts.join(' ');
    const heading = HEADING.exec(line);
    if (heading) placements[(provider = heading[1])] ??= [];
    const node = heading ? null : NODE.exec(line);
    if (node && provider) placements[provider].push([node[1], node[2]]);
  };
  for (const name of METHODS) console[name] = take;
  try {
    return [await make(), placements];
  } finally {
    Object.assign(console, before);
  }
}
