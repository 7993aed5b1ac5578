// k6 的混合负载，与 yinjian bench-loader、jmeter/mix.jmx 相同：70 % 签名、10 % 成批、10 % 验证、10 % 时间戳。用法见 ../README.md。
// The mix for k6, the same as that of yinjian bench-loader and jmeter/mix.jmx. How to run it: ../README.md.
//
// SM3 and HMAC-SM3 are written here, so that any k6 does: no extension, nothing to build. They cost the machine that loads far more than
// the request costs the appliance; for what an appliance can do at most, use several machines or the Go loader.
import http from 'k6/http';
import encoding from 'k6/encoding';
import exec from 'k6/execution';
import { randomBytes } from 'k6/crypto';
import { sleep } from 'k6';
import { Counter, Trend } from 'k6/metrics';

const target = JSON.parse(open(__ENV.TARGET));
const users = Number(__ENV.USERS || 500);
const warmUp = Number(__ENV.WARM_UP || 10); // seconds
const measured = Number(__ENV.SECONDS || 60);
const think = Number(__ENV.THINK || 0); // seconds, on average
const batchSize = Number(__ENV.BATCH || 10);
const bytes = Number(__ENV.BYTES || 2048);

export const options = {
  vus: users,
  duration: `${warmUp + measured}s`,
  summaryTrendStats: ['count', 'med', 'p(95)', 'p(99)', 'max'],
  thresholds: { problems: ['count==0'] },
  tlsVersion: { min: 'tls1.3', max: 'tls1.3' },
};

const names = ['sign', 'batch', 'verify', 'timestamp'];
const took = {};
for (const name of names) took[name] = new Trend(`${name}_ms`);
const problems = new Counter('problems'); // by code
const documents = new Counter('documents');
const warming = new Counter('answers_during_warm_up');

// SM3, GB/T 32905-2016.
const T = [];
for (let j = 0; j < 64; j++) {
  const t = j < 16 ? 0x79cc4519 : 0x7a879d8a;
  T.push(j % 32 ? (t << j % 32) | (t >>> (32 - (j % 32))) : t | 0);
}
const W = new Int32Array(68);

// No function is called in the rounds: k6's interpreter takes longer for a call than for what it does.
function compress(v, b, at) {
  for (let j = 0, i = at; j < 16; j++, i += 4) W[j] = (b[i] << 24) | (b[i + 1] << 16) | (b[i + 2] << 8) | b[i + 3];
  for (let j = 16; j < 68; j++) {
    const y = W[j - 3], x = W[j - 16] ^ W[j - 9] ^ ((y << 15) | (y >>> 17)), z = W[j - 13];
    W[j] = x ^ ((x << 15) | (x >>> 17)) ^ ((x << 23) | (x >>> 9)) ^ ((z << 7) | (z >>> 25)) ^ W[j - 6];
  }
  let A = v[0], B = v[1], C = v[2], D = v[3], E = v[4], F = v[5], G = v[6], H = v[7];
  for (let j = 0; j < 64; j++) {
    const a12 = (A << 12) | (A >>> 20), s = (a12 + E + T[j]) | 0, ss1 = (s << 7) | (s >>> 25), w = W[j];
    let x, y;
    if (j < 16) {
      x = A ^ B ^ C;
      y = E ^ F ^ G;
    } else {
      x = (A & B) | (A & C) | (B & C);
      y = (E & F) | (~E & G);
    }
    const tt1 = (x + D + (ss1 ^ a12) + (w ^ W[j + 4])) | 0, tt2 = (y + H + ss1 + w) | 0;
    D = C;
    C = (B << 9) | (B >>> 23);
    B = A;
    A = tt1;
    H = G;
    G = (F << 19) | (F >>> 13);
    F = E;
    E = tt2 ^ ((tt2 << 9) | (tt2 >>> 23)) ^ ((tt2 << 17) | (tt2 >>> 15));
  }
  return [v[0] ^ A, v[1] ^ B, v[2] ^ C, v[3] ^ D, v[4] ^ E, v[5] ^ F, v[6] ^ G, v[7] ^ H];
}

const IV = [0x7380166f, 0x4914b2b9, 0x172442d7, 0xda8a0600 | 0, 0xa96f30bc | 0, 0x163138aa, 0xe38dee4d | 0, 0xb0fb0e4e | 0];

// sm3 hashes what follows `before` bytes that led to state v.
function sm3(b, v = IV, before = 0) {
  const whole = b.length - (b.length % 64);
  for (let at = 0; at < whole; at += 64) v = compress(v, b, at);
  const rest = b.length - whole;
  const last = new Uint8Array(rest < 56 ? 64 : 128);
  last.set(b.subarray(whole));
  last[rest] = 0x80;
  const bits = (before + b.length) * 8;
  for (let i = 0; i < 6; i++) last[last.length - 1 - i] = Math.floor(bits / 2 ** (8 * i)) % 256;
  for (let at = 0; at < last.length; at += 64) v = compress(v, last, at);
  const out = new Uint8Array(32);
  v.forEach((x, i) => out.set([x >>> 24, (x >>> 16) & 255, (x >>> 8) & 255, x & 255], 4 * i));
  return out;
}

function ascii(s) {
  const out = new Uint8Array(s.length);
  for (let i = 0; i < s.length; i++) out[i] = s.charCodeAt(i);
  return out;
}

const hex = (b) => Array.from(b, (x) => (x < 16 ? '0' : '') + x.toString(16)).join('');

// keyed are the states after the key's block, RFC 2104.
function keyed(hexKey) {
  const inner = new Uint8Array(64).fill(0x36), outer = new Uint8Array(64).fill(0x5c);
  for (let i = 0; i < hexKey.length / 2; i++) {
    const k = parseInt(hexKey.substr(2 * i, 2), 16);
    inner[i] ^= k;
    outer[i] ^= k;
  }
  return { inner: compress(IV, inner, 0), outer: compress(IV, outer, 0) };
}

const hmac = (k, text) => sm3(sm3(ascii(text), k.inner, 64), k.outer, 64);

if (hex(sm3(ascii('abc'))) !== '66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0') throw new Error('SM3 is wrong'); // GB/T 32905-2016, A.1

let told = 0;
const keys = target.applications.map((a) => keyed(a.key_hex));
const host = target.api.replace('https://', '');
const content = encoding.b64encode(randomBytes(bytes));
const run = hex(new Uint8Array(randomBytes(8)));
let last = null; // this user's last signature
const digests = new Map(); // of bodies that come again: a signer's and the timestamp's are always the same
const remembered = 100;

function digest(body) {
  let d = digests.get(body);
  if (d) return d;
  d = hex(sm3(ascii(body)));
  if (body.length < 8192 && digests.size < remembered) digests.set(body, d);
  return d;
}

function post(path, body, headers) {
  const at = exec.vu.idInTest % keys.length;
  const app = target.applications[at].application, time = String(Date.now()), nonce = hex(new Uint8Array(randomBytes(16)));
  const text = ['YJ1-HMAC-SM3', 'POST', path, '', host, app, time, nonce, digest(body)].join('\n');
  const sig = encoding.b64encode(hmac(keys[at], text).buffer);
  return http.post(target.api + path, body, {
    timeout: '45s',
    headers: Object.assign({ 'Content-Type': 'application/json', Authorization: `YJ1-HMAC-SM3 app=${app},time=${time},nonce=${nonce},sig=${sig}` }, headers),
  });
}

const common = () => ({
  signer: target.signers[Math.floor(Math.random() * target.signers.length)], algorithm: 'SM2', form: 'raw', role: 'physician',
  consent: { method: 'app-asserted', assertion: 'load test' },
});
const document = { id: 'ZY20261118000731', type: 'discharge-summary', media_type: 'application/octet-stream' };
const key = () => `k6-${run}-${exec.vu.idInTest}-${exec.vu.iterationInInstance}`;

const ask = {
  sign() {
    const r = post('/v1/sign', JSON.stringify(Object.assign(common(), { content, document })), { 'Idempotency-Key': key() });
    if (r.status === 200) last = r.json();
    return [r, 1];
  },
  batch() {
    const items = [];
    for (let i = 0; i < batchSize; i++) items.push({ idempotency_key: `${key()}-${i}`, content, document });
    const r = post('/v1/batches', JSON.stringify(Object.assign(common(), { items })));
    if (r.status !== 200) return [r, batchSize];
    for (const item of r.json().items) if (item.problem) problems.add(1, { code: item.problem.code });
    return [r, batchSize];
  },
  verify() {
    const raw = { algorithm: 'SM2', value: last.signature, certificate: last.certificates[0], chain: last.certificates.slice(1) };
    if (last.token) raw.token = last.token;
    const r = post('/v1/verify', JSON.stringify({ raw, document: content }));
    if (r.status === 200 && !['valid', 'indeterminate'].includes(r.json().verdict)) problems.add(1, { code: 'wrong_answer' });
    return [r, 1];
  },
  timestamp() {
    return [post('/v1/timestamp', JSON.stringify({ data: content })), 1];
  },
};

export default function () {
  // Users begin one after the other, over the warm-up: five hundred handshakes at once, beside as many scripts, would take longer than the
  // five seconds that the appliance waits for one.
  if (exec.vu.iterationInInstance === 0) sleep((warmUp * (exec.vu.idInTest - 1)) / users);
  const n = Math.random() * 100;
  let name = n < 70 ? 'sign' : n < 80 ? 'batch' : n < 90 ? 'verify' : 'timestamp';
  if (name === 'verify' && !last) name = 'sign';
  const begun = Date.now();
  const [r, of] = ask[name]();
  if (r.status !== 200) {
    let code = 'no_answer';
    try {
      code = r.json().code;
    } catch (_) {} // nothing that is the appliance's
    problems.add(of, { code });
    if (++told <= 20) console.error(`${name}: ${r.status} ${code} ${r.error}`);
  } else if (begun - exec.scenario.startTime < warmUp * 1000) {
    warming.add(1);
  } else {
    documents.add(of);
    took[name].add(r.timings.duration);
  }
  if (think > 0) sleep(think * (0.5 + Math.random()));
}
