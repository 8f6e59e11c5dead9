// Downloads with progress that go on where they stopped. Files are kept in the browser's cache under their content's
// hash where the browser lets a page do so (secure contexts), so that each is brought once.

const RETRIES = 8;
const CACHE = 'signround-edge';

/** Uint8Array of base + name; `base` ends with the hash of the artifact's contents. report(fraction, text). */
export async function download(base, name, report) {
  const address = new URL(name, base);
  const key = `${new URL('.', address).pathname.split('/').at(-2)}/${name}`;
  const cache = await globalThis.caches?.open(CACHE).catch(() => null);
  const kept = await cache?.match(`/${key}`);
  if (kept) return new Uint8Array(await kept.arrayBuffer());
  const bytes = await fetchAll(address, (fraction) => report(fraction, `Loading ${name}…`));
  await cache?.put(`/${key}`, new Response(bytes)).catch(() => {}); // no room: it is brought again next time
  return bytes;
}

async function fetchAll(address, progress) {
  const parts = [];
  let received = 0;
  let total = null;
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(address, received ? { headers: { Range: `bytes=${received}-` } } : {});
      if (!response.ok) throw new Error(`${address.pathname.split('/').at(-1)}: ${response.status}`);
      total ??= Number(response.headers.get('Content-Length'));
      const reader = response.body.getReader();
      for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
        parts.push(value);
        received += value.length;
        progress(total ? received / total : null);
      }
      if (!total || received >= total) break;
    } catch (error) {
      if (attempt >= RETRIES) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 500 * 2 ** Math.min(attempt, 4)));
  }
  const bytes = new Uint8Array(received);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes;
}
