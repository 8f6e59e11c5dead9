// Frames of the worker protocol: see runtime_tests/worker/protocol.py. "SRE1", uint32 length of the header, the
// header (JSON; its "arrays" lists [name, dtype, shape]), and the arrays' bytes in that order. All little-endian.

const TYPES = { '<f4': Float32Array, '<i4': Int32Array, '<i8': BigInt64Array, '|u1': Uint8Array };
const NAMES = new Map(Object.entries(TYPES).map(([name, type]) => [type, name]));

/** One frame, as a Uint8Array. `arrays`: name → {data: typed array, shape: [n, …]}. */
export function encode(header, arrays = {}) {
  const listed = Object.entries(arrays).map(([name, { data, shape }]) => [name, NAMES.get(data.constructor), shape]);
  const text = new TextEncoder().encode(JSON.stringify({ ...header, arrays: listed }));
  const payload = Object.values(arrays).map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  const frame = new Uint8Array(8 + text.length + payload.reduce((sum, bytes) => sum + bytes.length, 0));
  frame.set([0x53, 0x52, 0x45, 0x31]);
  new DataView(frame.buffer).setUint32(4, text.length, true);
  frame.set(text, 8);
  let offset = 8 + text.length;
  for (const bytes of payload) {
    frame.set(bytes, offset);
    offset += bytes.length;
  }
  return frame;
}

/** {header, arrays, size} of the first frame in a Uint8Array, or null while it is not whole. */
export function decode(bytes) {
  if (bytes.length < 8) return null;
  if (String.fromCharCode(...bytes.subarray(0, 4)) !== 'SRE1') throw new Error('the client sent something that is no frame');
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = view.getUint32(4, true);
  if (bytes.length < 8 + length) return null;
  const { arrays: listed, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const arrays = {};
  let offset = 8 + length;
  for (const [name, dtype, shape] of listed) {
    const Type = TYPES[dtype];
    const size = shape.reduce((product, n) => product * n, 1) * Type.BYTES_PER_ELEMENT;
    if (bytes.length < offset + size) return null;
    arrays[name] = { data: new Type(bytes.slice(offset, offset + size).buffer), shape };
    offset += size;
  }
  return { header, arrays, size: offset };
}
