// Headless Chromium at phone size, as phone.py drives it: a request a line on stdin, a reply a line on stdout.
//
//     node phone.mjs <folder of playwright-core> <chromium> [flag of Chromium …]

import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

const [playwright, executablePath, ...flags] = process.argv.slice(2);
const { chromium } = await import(pathToFileURL(`${playwright}/index.mjs`));
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', ...flags] });
const requests = [];
let page;

const calls = {
  async open({ url, width, height, dark, before }) {
    await page?.context().close();
    const context = await browser.newContext({
      viewport: { width, height }, deviceScaleFactor: 2, isMobile: true, hasTouch: true, colorScheme: dark ? 'dark' : 'light',
    });
    page = await context.newPage();
    page.setDefaultTimeout(180_000);
    requests.length = 0;
    context.on('request', (request) => requests.push(request.url()));
    if (before) await page.addInitScript(before);
    await page.goto(url);
  },
  tap: ({ label }) => page.getByRole('button', { name: label, exact: true }).tap(),
  type: ({ label, text }) => page.getByRole('textbox', { name: label }).fill(text),
  evaluate: ({ expression }) => page.evaluate(expression),
  screenshot: ({ path }) => page.screenshot({ path }).then(() => null),
  requests: () => requests,
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, ...values } = JSON.parse(line);
  let reply;
  try {
    reply = { value: (await calls[call](values)) ?? null };
  } catch (error) {
    reply = { error: String(error) };
  }
  process.stdout.write(`${JSON.stringify(reply)}\n`);
}
await browser.close();
