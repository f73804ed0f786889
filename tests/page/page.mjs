// Drives the page of the relay's --metrics: see ../page.sh. Chromium is spoken to over a pipe, in
// its DevTools protocol, so that nothing has to be installed for it.
// SPDX-License-Identifier: MIT
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { createInterface } from 'node:readline';

const { BROWSER, SERVER, RELAY, WORK, SHOTS } = process.env;
const DEADLINE_MS = Number(process.env.VKP_TEST_PATIENCE || 30) * 1000;
const children = [];

function check(condition, what) {
  if (!condition) throw new Error(what);
  console.log(`ok: ${what}`);
}

function start(program, args, options = {}) {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'ignore'], ...options });
  children.push(child);
  child.gone = once(child, 'exit');
  return child;
}

async function stop(child, signal) {
  child.kill(signal);
  await child.gone;
}

// ---- the server and the relay ----

const socket = `${WORK}/server.sock`;

async function startServer() {
  const server = start(SERVER, ['--port', '0', '--unixsocket', socket, '--save', '']);
  for await (const line of createInterface({ input: server.stdout })) {
    if (/ready to accept/i.test(line) && line.includes('server.sock')) break;
  }
  server.stdout.resume();
  return server;
}

// Returns once it has said where it is.
async function startRelay(port) {
  const child = start(RELAY, ['--server', `unix:${socket}`, '--threads', '2',
    '--listen', `unix:${WORK}/relay.sock`, '--metrics', `tcp:127.0.0.1:${port}`]);
  for await (const line of createInterface({ input: child.stdout })) {
    if (line.startsWith('ready: http://')) {
      child.url = line.slice(7);
      break;
    }
  }
  return child;
}

// A client of the relay that counts what comes back.
class Client {
  constructor() {
    this.socket = connect(`${WORK}/relay.sock`);
    this.socket.on('error', () => {});
    this.received = 0;
    this.socket.on('data', data => {
      this.received += data.length;
      this.socket.emit('more');
    });
  }
  async ask(...words) {
    const before = this.received;
    const parts = words.map(word => `$${Buffer.byteLength(word)}\r\n${word}\r\n`);
    this.socket.write(`*${words.length}\r\n${parts.join('')}`);
    while (this.received === before) await once(this.socket, 'more');
  }
}

// ---- Chromium ----

class Browser {
  constructor() {
    this.child = start(BROWSER, ['--headless=new', '--no-sandbox', '--disable-gpu',
      '--disable-dev-shm-usage', '--no-first-run', '--disable-background-networking',
      '--hide-scrollbars', `--user-data-dir=${WORK}/profile`, '--remote-debugging-pipe',
      'about:blank'], { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'] });
    this.next = 1;
    this.waiting = new Map();
    this.problems = [];
    this.requests = new Set();
    let text = '';
    this.child.stdio[4].on('data', data => {
      text += data;
      for (let end = text.indexOf('\0'); end >= 0; end = text.indexOf('\0')) {
        this.take(JSON.parse(text.slice(0, end)));
        text = text.slice(end + 1);
      }
    });
  }
  take(message) {
    if (message.id) {
      const { resolve, reject } = this.waiting.get(message.id);
      this.waiting.delete(message.id);
      if (message.error) reject(new Error(message.error.message));
      else resolve(message.result);
    } else if (message.method === 'Runtime.exceptionThrown') {
      this.problems.push(message.params.exceptionDetails.exception?.description || 'exception');
    } else if (message.method === 'Log.entryAdded') {
      const { entry } = message.params;
      if (!/ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET/.test(entry.text)) {
        this.problems.push(entry.text); // those are of the restart
      }
    } else if (message.method === 'Network.requestWillBeSent') {
      this.requests.add(message.params.request.url);
    }
  }
  call(method, params = {}) {
    const id = this.next++;
    const message = { id, method, params, sessionId: this.session };
    this.child.stdio[3].write(`${JSON.stringify(message)}\0`);
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }
  async open(url) {
    const { targetId } = await this.call('Target.createTarget', { url: 'about:blank' });
    const { sessionId } = await this.call('Target.attachToTarget', { targetId, flatten: true });
    this.session = sessionId;
    for (const domain of ['Page', 'Runtime', 'Log', 'Network']) await this.call(`${domain}.enable`);
    await this.call('Page.navigate', { url });
  }
  async evaluate(expression) {
    const { result, exceptionDetails } = await this.call('Runtime.evaluate',
      { expression, awaitPromise: true, returnByValue: true });
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.text}`);
    return result.value;
  }
  // Looks at each frame whether it is so.
  async until(condition, what) {
    const there = await this.evaluate(`new Promise(done => {
      const end = Date.now() + ${DEADLINE_MS};
      const look = () => {
        let so = false;
        try { so = ${condition}; } catch (error) { so = false; }
        if (so || Date.now() > end) done(Boolean(so)); else setTimeout(look, 20);
      };
      look();
    })`);
    check(there, what);
  }
  async press(key, code, number, text) {
    const params = { key, code, windowsVirtualKeyCode: number, text };
    await this.call('Input.dispatchKeyEvent', { type: 'keyDown', ...params });
    await this.call('Input.dispatchKeyEvent', { type: 'keyUp', ...params });
  }
  async look(width, height, scheme, name) {
    await this.call('Emulation.setDeviceMetricsOverride',
      { width, height, deviceScaleFactor: 1, mobile: width < 500 });
    await this.call('Emulation.setEmulatedMedia',
      { features: [{ name: 'prefers-color-scheme', value: scheme }] });
    if (SHOTS) {
      const { data } = await this.call('Page.captureScreenshot', { captureBeyondViewport: true });
      mkdirSync(SHOTS, { recursive: true });
      writeFileSync(`${SHOTS}/${name}.png`, Buffer.from(data, 'base64'));
    }
  }
}

const text = id => `document.getElementById('${id}').textContent`;

// The darkness of the page's ground, 0 to 255, and the contrast of its text.
const colours = `(() => {
  const of = (element, name) => getComputedStyle(element)[name].match(/[0-9.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const card = light(of(document.querySelector('section'), 'backgroundColor'));
  const ratios = ['h2', 'dt', 'th', 'td.name', '.small', 'dd', 'footer', '#state', 'a']
    .map(s => ratio(light(of(document.querySelector(s), 'color')), card));
  return { card, least: Math.min(...ratios) };
})()`;

async function traffic(browser) {
  const hostile = '<img src=x onerror=window.hacked=1>';
  const subscriber = new Client();
  const publisher = new Client();
  await subscriber.ask('SUBSCRIBE', 'news', hostile, 'line\nend', 'x'.repeat(300));
  for (let i = 0; i < 200; i++) await publisher.ask('PUBLISH', 'news', 'x'.repeat(20));
  await publisher.ask('PUBLISH', hostile, 'x');
  await publisher.ask('PUBLISH', 'line\nend', 'x');
  await publisher.ask('PUBLISH', 'x'.repeat(300), 'x');
  await browser.until(`${text('channels')}.includes('news') &&
    ${text('channels')}.includes('${hostile}') && ${text('channels')}.includes('line\\\\x0aend') &&
    ${text('channels')}.includes('(300 B)')`, 'the page shows channels, of any name');
  check(await browser.evaluate('window.hacked === undefined && !document.querySelector("img")'),
    'a name of HTML is text');
  await browser.until(`Number(document.querySelector('#numbers dd').textContent) === 2`,
    'it counts clients');
  await publisher.ask('PUBLISH', 'news', 'x');
  await browser.until(`document.querySelectorAll('#chart path').length === 3 &&
    document.querySelector('#chart path').getAttribute('d').includes('L')`, 'it draws rates');
  await browser.until(`/subscribed 1/.test(${text('bar-key')})`, 'it shows what clients do');
  return publisher;
}

async function keyboard(browser) {
  const pressed = `document.getElementById('pause').getAttribute('aria-pressed')`;
  await browser.press('p', 'KeyP', 80, 'p');
  await browser.until(`${pressed} === 'true' && ${text('pause')} === 'Go on'`, 'P pauses');
  await browser.press('Tab', 'Tab', 9);
  await browser.until(`document.activeElement.id === 'pause'`, 'Tab leads to the button');
  await browser.press('Enter', 'Enter', 13, '\r');
  await browser.until(`${pressed} === 'false'`, 'Enter presses it');
  await browser.press('Tab', 'Tab', 9);
  await browser.until(`document.activeElement.id === 'span'`, 'then to how far back');
  await browser.press('1', 'Digit1', 49, '1');
  await browser.until(`document.getElementById('span').value !== '3600'`, 'a key chooses there');
}

async function outage(browser, server) {
  await stop(server, 'SIGKILL');
  await browser.until(`${text('state')}.startsWith('no connection to the server since')`,
    'an outage is said');
  await browser.until(`document.querySelector('#line div') &&
    ${text('outages')}.includes('lasts')`, 'it is on the time line while it lasts');
  await browser.look(1100, 1150, 'light', 'outage');
  const again = await startServer();
  await browser.until(`${text('state')}.startsWith('connected since')`, 'and its end');
  await browser.until(`document.querySelector('#line div') &&
    !${text('outages')}.includes('lasts') && /[0-9] s/.test(${text('outages')})`,
    'it stays on the time line');
  return again;
}

async function restart(browser, relay) {
  const port = new URL(relay.url).port;
  await stop(relay, 'SIGTERM');
  await browser.until(`${text('state')}.startsWith('the relay does not answer, last seen')`,
    'a relay that is gone is said');
  await browser.look(1100, 1150, 'light', 'gone');
  await startRelay(port);
  await browser.until(`${text('state')}.startsWith('connected since') &&
    ${text('outages')}.startsWith('none since')`, 'the next one is shown by itself');
}

async function looks(browser) {
  for (const [scheme, dark] of [['light', false], ['dark', true]]) {
    for (const [name, width, height] of [['wide', 1100, 1150], ['phone', 380, 2100]]) {
      await browser.look(width, height, scheme, `${scheme}-${name}`);
      await browser.until(`document.documentElement.scrollWidth <= ${width}`,
        `${scheme}, ${width} px: nothing sticks out`);
      const { card, least } = await browser.evaluate(colours);
      check((card < .2) === dark, `${scheme}: the ground is ${scheme}`);
      check(least >= 4.5, `${scheme}: text has a contrast of ${least.toFixed(1)}`);
    }
  }
}

async function run() {
  let server = await startServer();
  const relay = await startRelay(0);
  const browser = new Browser();
  await browser.open(`${relay.url}/`);
  await browser.until(`${text('state')}.startsWith('connected since')`, 'the page connects');
  await traffic(browser);
  server = await outage(browser, server);
  await looks(browser);
  await keyboard(browser);
  await restart(browser, relay);
  check(browser.problems.length === 0, `no errors in the page ${browser.problems}`);
  const strangers = [...browser.requests].filter(url => !url.startsWith(relay.url) &&
    !url.startsWith('data:'));
  check(strangers.length === 0, `it asked nobody else ${strangers}`);
  browser.call('Browser.close').catch(() => {});
  await browser.child.gone; // it writes to its folder until then
}

const alarm = setTimeout(() => {
  console.error('page: gave up');
  process.exit(1);
}, DEADLINE_MS * 4);
process.on('exit', () => children.forEach(child => child.kill('SIGKILL')));
try {
  await run();
  clearTimeout(alarm);
  process.exit(0);
} catch (error) {
  console.error(`page: failed: ${error.message}`);
  process.exit(1);
}
