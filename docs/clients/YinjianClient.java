// 印鉴接口的 Java 客户端：一个文件，Java 8 即可，不依赖任何第三方库。整份复制到工程中，按需加 package 行。
// A client of the appliance's API in one file: Java 8, no dependency. Copy it whole and add your package line. What is
// authenticated and how: docs/api-auth.md. What is retried and why: the table in docs/clients/README.md.
//
//   javac -encoding UTF-8 YinjianClient.java
//   java YinjianClient vector  hmac-vector.json
//   java YinjianClient sign    KEY-FILE URL CA-FILE BODY-FILE IDEMPOTENCY-KEY
//   java YinjianClient example KEY-FILE URL CA-FILE SIGNER PIN-FILE DOCUMENT
//
// KEY-FILE 即设备写出的 credentials/<应用>.json. `vector` checks SM3 and HMAC on your machine, `sign` sends one request
// with its retries, `example` goes through everything below.
//
// TLS: the appliance speaks TLS 1.3 alone unless its configuration says listen.tls12 = true. Java 8 has TLS 1.3 since
// update 261; older ones need listen.tls12.

import java.io.ByteArrayOutputStream;
import java.io.EOFException;
import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InterruptedIOException;
import java.io.OutputStream;
import java.io.PrintStream;
import java.net.ConnectException;
import java.net.NoRouteToHostException;
import java.net.Proxy;
import java.net.SocketTimeoutException;
import java.net.URL;
import java.net.UnknownHostException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.security.GeneralSecurityException;
import java.security.KeyStore;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.security.SecureRandom;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLHandshakeException;
import javax.net.ssl.SSLPeerUnverifiedException;
import javax.net.ssl.SSLSocketFactory;
import javax.net.ssl.TrustManagerFactory;

/** Safe for concurrent use; one object serves the whole program. */
public final class YinjianClient {
    static {
        // Java silently sends a POST again when its connection ends without an answer, with the same nonce. Where this
        // comes too late (another part of the program used HTTP before), the appliance refuses the second copy as
        // replayed_request, and call() goes on from there.
        if (System.getProperty("sun.net.http.retryPost") == null) {
            System.setProperty("sun.net.http.retryPost", "false");
        }
    }

    private static final int MAX_ATTEMPTS = 8;
    private static final int MAX_ANSWER = 64 << 20;
    private static final SecureRandom RANDOM = new SecureRandom();

    private final String base;
    private final String host;
    private final String app;
    private final byte[] key;
    private final SSLSocketFactory tls;
    private final long connectMillis;
    private final long attemptMillis;
    private final long totalMillis;

    /**
     * @param baseURL "https://yinjian.hospital.local:8443", without a path; the host must stand in the certificate
     * @param key     the HMAC-SM3 key, 32 bytes: hex-decoded from key_hex
     * @param caFile  PEM of the CA that the appliance's TLS certificate is under. Nothing else is trusted.
     */
    public YinjianClient(String baseURL, String app, byte[] key, File caFile) throws IOException {
        this(baseURL, app, key, trust(caFile), 5_000, 45_000, 120_000);
    }

    private YinjianClient(String baseURL, String app, byte[] key, SSLSocketFactory tls, long connect, long attempt, long total) {
        if (!baseURL.matches("https://[^/?#@]+/?")) {
            throw new IllegalArgumentException("baseURL: want https://host[:port]");
        }
        this.base = baseURL.endsWith("/") ? baseURL.substring(0, baseURL.length() - 1) : baseURL;
        this.host = this.base.substring("https://".length()).replaceFirst(":443$", ""); // as Java writes the Host header
        this.app = app;
        this.key = key.clone();
        this.tls = tls;
        this.connectMillis = connect;
        this.attemptMillis = attempt;
        this.totalMillis = total;
    }

    /** The same client with other times. An attempt should not be shorter than the 30 s the appliance may take. */
    public YinjianClient withTimes(long connectMillis, long attemptMillis, long totalMillis) {
        return new YinjianClient(base, app, key, tls, connectMillis, attemptMillis, totalMillis);
    }

    /** The appliance's refusal. Show detail and next to people, switch on code, keep instance for the administrator. */
    public static final class Refused extends IOException {
        private static final long serialVersionUID = 1;
        public final int status;
        public final String code;      // "pin_wrong"; "" when the answer is not the appliance's
        public final String retry;     // never, resign, same-key, later or operator: docs/errors.md
        public final String detail;    // reason, Chinese first
        public final String next;      // what to do, Chinese first
        public final String field;     // the request's field at fault, or null
        public final String instance;  // the request's number in the appliance's log
        public final Long triesLeft;   // with pin_wrong, else null
        public final long retryAfterMillis;
        /** Whether this attempt or an earlier one may have signed nevertheless: call again with the same Idempotency-Key. */
        public boolean outcomeUnknown;

        Refused(int status, Map<String, Object> p, long retryAfterMillis) {
            super(text(p, "code") + ": " + text(p, "detail") + "; " + text(p, "next") + " [" + status + " " + text(p, "instance") + "]");
            this.status = status;
            this.code = text(p, "code");
            this.retry = text(p, "retry");
            this.detail = text(p, "detail");
            this.next = text(p, "next");
            this.field = (String) p.get("field");
            this.instance = text(p, "instance");
            this.triesLeft = (Long) p.get("tries_left");
            this.retryAfterMillis = retryAfterMillis;
        }

        boolean again() {
            return retry.equals("same-key") || retry.equals("later") || retry.equals("resign");
        }

        private static String text(Map<String, Object> p, String name) {
            return p.get(name) instanceof String ? (String) p.get(name) : "";
        }
    }

    /** No answer came. If outcomeUnknown, the appliance may have signed: call again with the same Idempotency-Key. */
    public static final class NoAnswer extends IOException {
        private static final long serialVersionUID = 1;
        public final boolean outcomeUnknown;

        NoAnswer(boolean outcomeUnknown, IOException cause) {
            super((outcomeUnknown ? "结果未知，请用同一个 Idempotency-Key 重试 (outcome unknown, call again with the same key): "
                : "请求未送达 (nothing was sent): ") + cause, cause);
            this.outcomeUnknown = outcomeUnknown;
        }
    }

    // ---- The routes. Requests are maps as in openapi.json; byte[] becomes base64. ----

    /**
     * Signs. The key (1-128 visible ASCII) names this act, for instance record number, version and purpose: store it
     * before the call and use it again until you have the answer. However often it is sent, there is one record.
     */
    public Map<String, Object> sign(String idempotencyKey, Map<String, Object> request) throws IOException {
        if (!idempotencyKey.matches("[\\x21-\\x7e]{1,128}")) {
            throw new IllegalArgumentException("idempotencyKey: want 1 to 128 visible ASCII characters");
        }
        return object(call("POST", "/v1/sign", json(request), idempotencyKey, true));
    }

    /** Never sent twice: a wrong PIN counts. After NoAnswer ask the signer for the PIN again. */
    public Map<String, Object> authorize(Map<String, Object> request) throws IOException {
        return object(call("POST", "/v1/authorizations", json(request), null, false));
    }

    /** The evidence of a record, byte for byte: store it as it is. */
    public byte[] evidence(String recordID) throws IOException {
        if (!recordID.matches("[0-9a-f]{64}")) {
            throw new IllegalArgumentException("recordID: want 64 hexadecimal digits");
        }
        return call("GET", "/v1/evidence/" + recordID, new byte[0], null, true);
    }

    public Map<String, Object> verify(Map<String, Object> request) throws IOException {
        return object(call("POST", "/v1/verify", json(request), null, true));
    }

    /** A retry after a lost answer makes a second, equally good token. */
    public Map<String, Object> timestamp(Map<String, Object> request) throws IOException {
        return object(call("POST", "/v1/timestamp", json(request), null, true));
    }

    // ---- Sending ----

    /**
     * Sends a request, again while that may help and is safe: each attempt has the same Idempotency-Key and body, and a
     * new time and nonce. Pauses double from 200 ms to 5 s, with jitter, and are never shorter than Retry-After.
     */
    private byte[] call(String method, String path, byte[] body, String idempotencyKey, boolean retry) throws IOException {
        final long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(totalMillis);
        boolean unknown = false; // whether any attempt so far may have signed
        for (int attempt = 1; ; attempt++) {
            IOException failure;
            boolean again;
            long least = 0;
            long left = TimeUnit.NANOSECONDS.toMillis(end - System.nanoTime());
            try {
                return once(method, path, body, idempotencyKey, Math.max(1, Math.min(attemptMillis, left)));
            } catch (Refused e) {
                // replayed_request: something in between sent the request twice, and one copy came through.
                unknown |= e.retry.equals("same-key") || e.code.equals("replayed_request") || e.code.isEmpty() && e.status / 100 != 4;
                e.outcomeUnknown = unknown;
                failure = e;
                again = e.again();
                least = e.retryAfterMillis;
            } catch (IOException e) {
                unknown |= !neverSent(e);
                failure = new NoAnswer(unknown, e);
                again = !distrusted(e);
            }
            long pause = Math.min(200L << Math.min(attempt - 1, 6), 5_000);
            pause = Math.max(least, pause / 2 + ThreadLocalRandom.current().nextLong(pause / 2 + 1));
            left = TimeUnit.NANOSECONDS.toMillis(end - System.nanoTime());
            if (!retry || !again || attempt >= MAX_ATTEMPTS || pause >= left) {
                throw failure;
            }
            try {
                Thread.sleep(pause);
            } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
                throw failure;
            }
        }
    }

    /** The connection was refused or not made: the request cannot have arrived. */
    private static boolean neverSent(IOException e) {
        return e instanceof ConnectException || e instanceof NoRouteToHostException || e instanceof UnknownHostException
            || e instanceof SSLHandshakeException || e instanceof SSLPeerUnverifiedException
            || e instanceof SocketTimeoutException && "connect timed out".equalsIgnoreCase(String.valueOf(e.getMessage()));
    }

    /** A wrong certificate, host name or TLS version stays wrong; a handshake that was cut off, or the appliance's key away, does not. */
    private static boolean distrusted(IOException e) {
        return e instanceof SSLPeerUnverifiedException || e instanceof SSLHandshakeException
            && !(e.getCause() instanceof EOFException) && !String.valueOf(e.getMessage()).contains("internal_error");
    }

    // HttpsURLConnection has no limit for a whole exchange, and none at all for writing: the attempt runs beside us and
    // is cut off when its time is over.
    private static final ExecutorService ATTEMPTS = Executors.newCachedThreadPool(task -> {
        Thread t = new Thread(task, "yinjian-attempt");
        t.setDaemon(true);
        return t;
    });

    private byte[] once(String method, String path, byte[] body, String idempotencyKey, long millis) throws IOException {
        final HttpsURLConnection c = (HttpsURLConnection) new URL(base + path).openConnection(Proxy.NO_PROXY);
        c.setSSLSocketFactory(tls); // the host name is checked by HttpsURLConnection's own verifier
        c.setRequestMethod(method);
        c.setConnectTimeout((int) Math.min(connectMillis, millis));
        c.setReadTimeout((int) millis);
        c.setInstanceFollowRedirects(false);
        c.setUseCaches(false);
        c.setRequestProperty("Accept", "application/json");
        String time = Long.toString(System.currentTimeMillis());
        c.setRequestProperty("Authorization", authorization(key, method, path, "", host, app, time, nonce(), body));
        if (idempotencyKey != null) {
            c.setRequestProperty("Idempotency-Key", idempotencyKey);
        }
        if (body.length > 0) {
            c.setRequestProperty("Content-Type", "application/json");
            c.setDoOutput(true); // not streaming: that loses the body of every 401, and with it the reason
        }
        Future<byte[]> exchange = ATTEMPTS.submit(() -> exchange(c, body));
        try {
            return exchange.get(millis, TimeUnit.MILLISECONDS);
        } catch (TimeoutException e) {
            ATTEMPTS.submit(c::disconnect); // may itself wait for a writer
            throw new SocketTimeoutException("no answer within " + millis + " ms");
        } catch (InterruptedException e) {
            ATTEMPTS.submit(c::disconnect);
            Thread.currentThread().interrupt();
            throw new InterruptedIOException("interrupted");
        } catch (ExecutionException e) {
            if (e.getCause() instanceof IOException) {
                throw (IOException) e.getCause();
            }
            throw new IOException(e.getCause());
        }
    }

    private static byte[] exchange(HttpsURLConnection c, byte[] body) throws IOException {
        if (body.length > 0) {
            try (OutputStream out = c.getOutputStream()) {
                out.write(body);
            }
        }
        int status = c.getResponseCode();
        if (status < 0) {
            throw new IOException("not an HTTP answer");
        }
        byte[] answer = read(status >= 400 ? c.getErrorStream() : c.getInputStream());
        long announced = c.getContentLengthLong();
        if (announced >= 0 && announced != answer.length) { // Java 8 takes a body that was cut off for a whole one
            throw new EOFException("the answer was cut off");
        }
        String type = String.valueOf(c.getContentType());
        if (status == 200 && type.startsWith("application/json")) {
            return answer;
        }
        Map<String, Object> problem = new LinkedHashMap<>();
        if (type.startsWith("application/problem+json")) {
            try {
                problem = object(answer);
            } catch (IOException e) {
                problem.clear(); // an answer of something in between: judged by its status
            }
        }
        if (problem.isEmpty()) {
            problem.put("detail", "不是设备的回答 (not the appliance's answer): " + type);
            problem.put("next", "请检查地址与中间的代理 (check the address and what stands in between)");
            problem.put("retry", status == 429 ? "later" : status >= 502 && status <= 504 ? "same-key" : "never");
        }
        throw new Refused(status, problem, retryAfter(c.getHeaderField("Retry-After")));
    }

    /** RFC 9110 §10.2.3, in seconds, as the appliance sends it. */
    private static long retryAfter(String value) {
        return value != null && value.matches("[0-9]{1,6}") ? 1000 * Long.parseLong(value) : 0;
    }

    private static byte[] read(InputStream in) throws IOException {
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        if (in == null) {
            return new byte[0];
        }
        try (InputStream stream = in) {
            byte[] buffer = new byte[8192];
            for (int n; (n = stream.read(buffer)) >= 0; ) {
                out.write(buffer, 0, n);
                if (out.size() > MAX_ANSWER) {
                    throw new IOException("answer too large");
                }
            }
        }
        return out.toByteArray();
    }

    /** Trusts the CAs of a PEM file and nothing else. */
    private static SSLSocketFactory trust(File caFile) throws IOException {
        try (InputStream in = new FileInputStream(caFile)) {
            KeyStore store = KeyStore.getInstance(KeyStore.getDefaultType());
            store.load(null, null);
            for (Certificate c : CertificateFactory.getInstance("X.509").generateCertificates(in)) {
                store.setCertificateEntry("ca-" + store.size(), c);
            }
            if (store.size() == 0) {
                throw new IOException(caFile + " holds no certificate");
            }
            TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
            trust.init(store);
            SSLContext context;
            try {
                context = SSLContext.getInstance("TLSv1.3");
            } catch (NoSuchAlgorithmException e) {
                context = SSLContext.getInstance("TLSv1.2"); // before 8u261
            }
            context.init(null, trust.getTrustManagers(), null);
            return context.getSocketFactory();
        } catch (GeneralSecurityException e) {
            throw new IOException("CA file " + caFile + ": " + e, e);
        }
    }

    // ---- docs/api-auth.md ----

    /** The Authorization header's value. */
    public static String authorization(byte[] key, String method, String path, String query, String host, String app, String time, String nonce, byte[] body) {
        String[] pieces = query.split("&", -1);
        // Bytewise; a request target is ASCII, for which Java's order of chars is the same.
        Arrays.sort(pieces);
        String text = String.join("\n", "YJ1-HMAC-SM3", method, path, String.join("&", pieces), lowerASCII(host), app, time, nonce, hex(sm3(body)));
        String sig = Base64.getEncoder().encodeToString(hmacSM3(key, text.getBytes(StandardCharsets.UTF_8)));
        return "YJ1-HMAC-SM3 app=" + app + ",time=" + time + ",nonce=" + nonce + ",sig=" + sig;
    }

    /** Not toLowerCase(): under a Turkish locale that makes another letter of I. */
    private static String lowerASCII(String s) {
        char[] out = s.toCharArray();
        for (int i = 0; i < out.length; i++) {
            if (out[i] >= 'A' && out[i] <= 'Z') {
                out[i] += 'a' - 'A';
            }
        }
        return new String(out);
    }

    private static String nonce() {
        byte[] random = new byte[18];
        RANDOM.nextBytes(random);
        return Base64.getUrlEncoder().withoutPadding().encodeToString(random);
    }

    /** RFC 2104 with SM3: block 64 bytes, output 32 bytes. */
    public static byte[] hmacSM3(byte[] key, byte[] message) {
        byte[] k = Arrays.copyOf(key.length > 64 ? sm3(key) : key, 64);
        byte[] inner = Arrays.copyOf(k, 64 + message.length);
        byte[] outer = Arrays.copyOf(k, 64 + 32);
        for (int i = 0; i < 64; i++) {
            inner[i] ^= 0x36;
            outer[i] ^= 0x5c;
        }
        System.arraycopy(message, 0, inner, 64, message.length);
        System.arraycopy(sm3(inner), 0, outer, 64, 32);
        return sm3(outer);
    }

    /** GB/T 32905-2016. */
    public static byte[] sm3(byte[] message) {
        int[] v = {0x7380166f, 0x4914b2b9, 0x172442d7, 0xda8a0600, 0xa96f30bc, 0x163138aa, 0xe38dee4d, 0xb0fb0e4e};
        int whole = message.length / 64 * 64;
        int[] w = new int[68];
        for (int i = 0; i < whole; i += 64) {
            compress(v, w, message, i);
        }
        // §5.2: a one bit, zeros, and the length in bits.
        byte[] tail = Arrays.copyOf(Arrays.copyOfRange(message, whole, message.length), message.length - whole < 56 ? 64 : 128);
        tail[message.length - whole] = (byte) 0x80;
        long bits = 8L * message.length;
        for (int i = 0; i < 8; i++) {
            tail[tail.length - 1 - i] = (byte) (bits >>> 8 * i);
        }
        for (int i = 0; i < tail.length; i += 64) {
            compress(v, w, tail, i);
        }
        byte[] out = new byte[32];
        for (int i = 0; i < 32; i++) {
            out[i] = (byte) (v[i / 4] >>> 24 - 8 * (i % 4));
        }
        return out;
    }

    // §5.3.2 and §5.3.3.
    private static void compress(int[] v, int[] w, byte[] block, int at) {
        for (int j = 0; j < 16; j++) {
            int i = at + 4 * j;
            w[j] = block[i] << 24 | (block[i + 1] & 0xff) << 16 | (block[i + 2] & 0xff) << 8 | block[i + 3] & 0xff;
        }
        for (int j = 16; j < 68; j++) {
            int x = w[j - 16] ^ w[j - 9] ^ Integer.rotateLeft(w[j - 3], 15);
            w[j] = x ^ Integer.rotateLeft(x, 15) ^ Integer.rotateLeft(x, 23) ^ Integer.rotateLeft(w[j - 13], 7) ^ w[j - 6];
        }
        int a = v[0], b = v[1], c = v[2], d = v[3], e = v[4], f = v[5], g = v[6], h = v[7];
        for (int j = 0; j < 64; j++) {
            int a12 = Integer.rotateLeft(a, 12);
            int ss1 = Integer.rotateLeft(a12 + e + Integer.rotateLeft(j < 16 ? 0x79cc4519 : 0x7a879d8a, j % 32), 7);
            int ff = j < 16 ? a ^ b ^ c : a & b | a & c | b & c;
            int gg = j < 16 ? e ^ f ^ g : e & f | ~e & g;
            int tt1 = ff + d + (ss1 ^ a12) + (w[j] ^ w[j + 4]);
            int tt2 = gg + h + ss1 + w[j];
            d = c;
            c = Integer.rotateLeft(b, 9);
            b = a;
            a = tt1;
            h = g;
            g = Integer.rotateLeft(f, 19);
            f = e;
            e = tt2 ^ Integer.rotateLeft(tt2, 9) ^ Integer.rotateLeft(tt2, 17);
        }
        v[0] ^= a;
        v[1] ^= b;
        v[2] ^= c;
        v[3] ^= d;
        v[4] ^= e;
        v[5] ^= f;
        v[6] ^= g;
        v[7] ^= h;
    }

    public static String hex(byte[] b) {
        StringBuilder s = new StringBuilder();
        for (byte x : b) {
            s.append(Character.forDigit(x >> 4 & 15, 16)).append(Character.forDigit(x & 15, 16));
        }
        return s.toString();
    }

    public static byte[] unhex(String s) {
        if (!s.matches("([0-9A-Fa-f]{2})+")) {
            throw new IllegalArgumentException("not hexadecimal");
        }
        byte[] out = new byte[s.length() / 2];
        for (int i = 0; i < out.length; i++) {
            out[i] = (byte) Integer.parseInt(s.substring(2 * i, 2 * i + 2), 16);
        }
        return out;
    }

    // ---- JSON (RFC 8259), as much as is needed. Use your own library's instead if you have one. ----

    /** map("a", 1, "b", map(...)); a value that is null is left out, since the appliance refuses null. */
    public static Map<String, Object> map(Object... namesAndValues) {
        Map<String, Object> m = new LinkedHashMap<>();
        for (int i = 0; i < namesAndValues.length; i += 2) {
            if (namesAndValues[i + 1] != null) {
                m.put((String) namesAndValues[i], namesAndValues[i + 1]);
            }
        }
        return m;
    }

    /** JSON that is passed on byte for byte: an evidence file in a request to verify. */
    public static final class Verbatim {
        final String json;

        public Verbatim(byte[] json) {
            this.json = new String(json, StandardCharsets.UTF_8);
        }
    }

    /** Maps, lists, strings, whole numbers, booleans, byte[] (as base64) and Verbatim. */
    public static byte[] json(Object value) {
        StringBuilder out = new StringBuilder();
        write(out, value);
        return out.toString().getBytes(StandardCharsets.UTF_8);
    }

    private static void write(StringBuilder out, Object v) {
        if (v instanceof Map) {
            String separator = "{";
            for (Map.Entry<?, ?> e : ((Map<?, ?>) v).entrySet()) {
                out.append(separator);
                write(out, e.getKey());
                out.append(':');
                write(out, e.getValue());
                separator = ",";
            }
            out.append(separator.equals("{") ? "{}" : "}");
        } else if (v instanceof List) {
            String separator = "[";
            for (Object item : (List<?>) v) {
                out.append(separator);
                write(out, item);
                separator = ",";
            }
            out.append(separator.equals("[") ? "[]" : "]");
        } else if (v instanceof byte[]) {
            out.append('"').append(Base64.getEncoder().encodeToString((byte[]) v)).append('"');
        } else if (v instanceof String) {
            out.append('"');
            for (char c : ((String) v).toCharArray()) {
                if (c == '"' || c == '\\') {
                    out.append('\\').append(c);
                } else if (c < ' ') {
                    out.append(String.format("\\u%04x", (int) c));
                } else {
                    out.append(c);
                }
            }
            out.append('"');
        } else if (v instanceof Verbatim) {
            out.append(((Verbatim) v).json);
        } else if (v instanceof Integer || v instanceof Long || v instanceof Boolean) {
            out.append(v);
        } else {
            throw new IllegalArgumentException("no JSON for " + v);
        }
    }

    @SuppressWarnings("unchecked")
    public static Map<String, Object> object(byte[] json) throws IOException {
        Object v = new Parser(new String(json, StandardCharsets.UTF_8)).whole();
        if (!(v instanceof Map)) {
            throw new IOException("JSON: not an object");
        }
        return (Map<String, Object>) v;
    }

    /** Objects become maps, arrays lists, whole numbers Long, other numbers Double. */
    private static final class Parser {
        private final String s;
        private int at;
        private int depth;

        Parser(String s) {
            this.s = s;
        }

        Object whole() throws IOException {
            Object v = value();
            space();
            if (at != s.length()) {
                throw bad();
            }
            return v;
        }

        private IOException bad() {
            return new IOException("JSON: unexpected at character " + at);
        }

        private void space() {
            while (at < s.length() && " \t\r\n".indexOf(s.charAt(at)) >= 0) {
                at++;
            }
        }

        private boolean take(String word) {
            space();
            boolean there = s.startsWith(word, at);
            at += there ? word.length() : 0;
            return there;
        }

        private void want(String word) throws IOException {
            if (!take(word)) {
                throw bad();
            }
        }

        private Object value() throws IOException {
            if (++depth > 64) {
                throw bad();
            }
            try {
                if (take("{")) {
                    Map<String, Object> m = new LinkedHashMap<>();
                    if (take("}")) {
                        return m;
                    }
                    do {
                        want("\"");
                        String name = string();
                        want(":");
                        m.put(name, value());
                    } while (take(","));
                    want("}");
                    return m;
                }
                if (take("[")) {
                    List<Object> l = new ArrayList<>();
                    if (take("]")) {
                        return l;
                    }
                    do {
                        l.add(value());
                    } while (take(","));
                    want("]");
                    return l;
                }
                return take("\"") ? string() : take("true") ? Boolean.TRUE : take("false") ? Boolean.FALSE : take("null") ? null : number();
            } finally {
                depth--;
            }
        }

        private Object number() throws IOException {
            int begin = at;
            while (at < s.length() && "+-.eE0123456789".indexOf(s.charAt(at)) >= 0) {
                at++;
            }
            String n = s.substring(begin, at);
            try {
                return n.matches("-?[0-9]{1,18}") ? (Object) Long.valueOf(n) : (Object) Double.valueOf(n);
            } catch (NumberFormatException e) {
                throw bad();
            }
        }

        private String string() throws IOException {
            StringBuilder out = new StringBuilder();
            while (at < s.length()) {
                char c = s.charAt(at++);
                if (c == '"') {
                    return out.toString();
                }
                if (c != '\\') {
                    out.append(c);
                    continue;
                }
                char kind = at < s.length() ? s.charAt(at++) : 0;
                int plain = "\"\\/bfnrt".indexOf(kind);
                if (plain >= 0) {
                    out.append("\"\\/\b\f\n\r\t".charAt(plain));
                } else if (kind == 'u' && at + 4 <= s.length() && s.substring(at, at + 4).matches("[0-9A-Fa-f]{4}")) {
                    out.append((char) Integer.parseInt(s.substring(at, at + 4), 16));
                    at += 4;
                } else {
                    throw bad();
                }
            }
            throw bad();
        }
    }

    // ---- The command ----

    /** Reads credentials/APP.json and makes a client of it. The environment may change the times, in seconds. */
    public static YinjianClient open(String keyFile, String url, String caFile) throws IOException {
        Map<String, Object> credentials = object(Files.readAllBytes(new File(keyFile).toPath()));
        if (!(credentials.get("application") instanceof String) || !(credentials.get("key_hex") instanceof String)) {
            throw new IOException(keyFile + " holds no application and key");
        }
        return new YinjianClient(url, (String) credentials.get("application"), unhex((String) credentials.get("key_hex")), new File(caFile))
            .withTimes(seconds("YINJIAN_CONNECT_SECONDS", 5), seconds("YINJIAN_ATTEMPT_SECONDS", 45), seconds("YINJIAN_TOTAL_SECONDS", 120));
    }

    private static long seconds(String name, long otherwise) {
        String s = System.getenv(name);
        return 1000 * (s == null || s.isEmpty() ? otherwise : Long.parseLong(s));
    }

    /** Exits 0, 1 (vector differs), 2 (misused), 3 (nothing was signed) or 4 (outcome unknown: run again, same key). */
    public static void main(String[] args) throws Exception {
        PrintStream out = new PrintStream(System.out, true, "UTF-8");
        PrintStream err = new PrintStream(System.err, true, "UTF-8");
        try {
            if (args.length == 2 && args[0].equals("vector")) {
                System.exit(vector(args[1], out) ? 0 : 1);
            } else if (args.length == 6 && args[0].equals("sign")) {
                byte[] body = Files.readAllBytes(new File(args[4]).toPath());
                out.write(open(args[1], args[2], args[3]).call("POST", "/v1/sign", body, args[5], true));
                out.println();
            } else if (args.length == 7 && args[0].equals("example")) {
                byte[] document = Files.readAllBytes(new File(args[6]).toPath());
                String pin = new String(Files.readAllBytes(new File(args[5]).toPath()), StandardCharsets.UTF_8).trim();
                example(open(args[1], args[2], args[3]), args[4], pin, document, out);
            } else {
                err.println("usage: YinjianClient vector FILE | sign KEY-FILE URL CA-FILE BODY-FILE IDEMPOTENCY-KEY"
                    + " | example KEY-FILE URL CA-FILE SIGNER PIN-FILE DOCUMENT");
                System.exit(2);
            }
        } catch (Refused e) {
            err.println("refused: " + e.getMessage());
            System.exit(e.outcomeUnknown ? 4 : 3);
        } catch (NoAnswer e) {
            err.println("no answer: " + e.getMessage());
            System.exit(e.outcomeUnknown ? 4 : 3);
        } catch (IllegalArgumentException | IOException e) {
            err.println(String.valueOf(e));
            System.exit(2);
        }
    }

    private static boolean vector(String file, PrintStream out) throws IOException {
        boolean good = true;
        for (Object item : (List<?>) object(Files.readAllBytes(new File(file).toPath())).get("vectors")) {
            Map<?, ?> v = (Map<?, ?>) item;
            String got = authorization(unhex((String) v.get("key_hex")), (String) v.get("method"), (String) v.get("path"), (String) v.get("query"),
                (String) v.get("host"), (String) v.get("app"), (String) v.get("time"), (String) v.get("nonce"),
                ((String) v.get("body")).getBytes(StandardCharsets.UTF_8));
            out.println(got);
            good &= got.equals(v.get("authorization"));
        }
        return good;
    }

    /** Everything an application does, in its order. */
    private static void example(YinjianClient c, String signer, String pin, byte[] document, PrintStream out) throws IOException {
        String visit = "example-" + nonce(); // yours: the record's number and version, stored before the call
        Map<String, Object> description = map("id", visit, "type", "discharge-summary", "media_type", "application/xml");

        // 1. Consent by PIN, bound to this document: SM3 for SM2.
        Map<String, Object> once = c.authorize(map("signer", signer, "pin", pin, "digests", Collections.singletonList(sm3(document))));
        out.println("authorization " + once.get("id"));

        // 2. A raw SM2 signature, over content.
        Map<String, Object> raw = c.sign(visit + "-raw", map(
            "signer", signer, "algorithm", "SM2", "form", "raw", "content", document, "document", description,
            "role", "主治医师", "consent", map("authorization_id", once.get("id"))));
        out.println("raw " + raw.get("record_id"));

        // 3. Two CMS, of a digest alone and with the content inside; consent for two signatures within ten minutes.
        Map<String, Object> twice = c.authorize(map("signer", signer, "pin", pin, "count", 2, "seconds", 600));
        Map<String, Object> request = map(
            "signer", signer, "algorithm", "SM2", "form", "cms", "document", description,
            "role", "主治医师", "consent", map("authorization_id", twice.get("id")));
        request.put("digest", map("algorithm", "SM3", "value", sm3(document)));
        Map<String, Object> cms = c.sign(visit + "-cms", request);
        out.println("cms " + cms.get("record_id"));
        request.remove("digest");
        request.put("content", document);
        request.put("detached", false);
        Map<String, Object> inside = c.sign(visit + "-cms-content", request);
        out.println("cms-content " + inside.get("record_id"));

        // 4. The evidence, to be stored beside the record, and the appliance's opinion of it and of the CMS.
        byte[] evidence = c.evidence((String) cms.get("record_id"));
        out.println("evidence " + evidence.length + " bytes");
        out.println("verify evidence " + c.verify(map("evidence", new Verbatim(evidence), "document", document)).get("verdict"));
        out.println("verify cms " + c.verify(map("cms", Base64.getDecoder().decode((String) cms.get("signature")), "document", document)).get("verdict"));

        // 5. A time-stamp by itself.
        Map<String, Object> stamp = c.timestamp(map("digest", map("algorithm", "SM3", "value", sm3(document))));
        out.println("timestamp " + stamp.get("gen_time"));

        // 6. The same act again gives the same record.
        Map<String, Object> again = c.sign(visit + "-cms-content", request);
        out.println("again " + again.get("record_id") + " replayed " + again.get("replayed"));
    }
}
