// JMeter 的 Java 请求：按业务系统的方式认证(HMAC-SM3)并发出一次签名、成批、验证或时间戳。用法见 ../README.md。
// A Java request for JMeter: one signature, batch, verification or timestamp, authenticated as business systems do. SM3 and the header
// come from docs/clients/YinjianClient.java, whose vectors are tested; nothing is sent twice. How to run it: ../README.md.

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.net.URL;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.security.KeyStore;
import java.security.SecureRandom;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.atomic.AtomicLong;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocketFactory;
import javax.net.ssl.TrustManagerFactory;
import org.apache.jmeter.config.Arguments;
import org.apache.jmeter.protocol.java.sampler.AbstractJavaSamplerClient;
import org.apache.jmeter.protocol.java.sampler.JavaSamplerContext;
import org.apache.jmeter.samplers.SampleResult;

/** One object for each user and element of the plan. */
public final class YinjianSampler extends AbstractJavaSamplerClient {
    /** What all users share: the target file, read once. */
    private static final class Target {
        final String api;
        final String host;
        final List<String> applications = new ArrayList<>();
        final List<byte[]> keys = new ArrayList<>();
        final List<String> signers = new ArrayList<>();
        final SSLSocketFactory tls;

        Target(File file) throws Exception {
            Map<String, Object> t = YinjianClient.object(Files.readAllBytes(file.toPath()));
            api = (String) t.get("api");
            host = api.substring("https://".length()).replaceFirst(":443$", "");
            for (Object one : (List<?>) t.get("applications")) {
                applications.add((String) ((Map<?, ?>) one).get("application"));
                keys.add(YinjianClient.unhex((String) ((Map<?, ?>) one).get("key_hex")));
            }
            for (Object one : (List<?>) t.get("signers")) {
                signers.add((String) one);
            }
            File ca = new File((String) t.get("ca"));
            if (!ca.isAbsolute()) {
                ca = new File(file.getAbsoluteFile().getParentFile(), ca.getPath());
            }
            KeyStore roots = KeyStore.getInstance(KeyStore.getDefaultType());
            roots.load(null, null);
            for (Certificate c : CertificateFactory.getInstance("X.509").generateCertificates(new ByteArrayInputStream(Files.readAllBytes(ca.toPath())))) {
                roots.setCertificateEntry("ca" + roots.size(), c);
            }
            TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
            trust.init(roots);
            SSLContext context = SSLContext.getInstance("TLS");
            context.init(null, trust.getTrustManagers(), null);
            tls = context.getSocketFactory();
        }
    }

    private static Target target;
    private static final String RUN = Long.toHexString(new SecureRandom().nextLong());
    private static final AtomicLong SERIAL = new AtomicLong();
    private static final ThreadLocal<Map<String, Object>> LAST = new ThreadLocal<>(); // the user's last signature

    private static synchronized Target target(String file) throws Exception {
        if (target == null) {
            target = new Target(new File(file));
        }
        return target;
    }

    @Override
    public Arguments getDefaultParameters() {
        Arguments a = new Arguments();
        a.addArgument("target", "${__P(target)}");
        a.addArgument("what", "sign");
        a.addArgument("bytes", "${__P(bytes,2048)}");
        a.addArgument("batch", "${__P(batch,10)}");
        return a;
    }

    @Override
    public SampleResult runTest(JavaSamplerContext c) {
        SampleResult r = new SampleResult();
        String what = c.getParameter("what", "sign");
        if (what.equals("verify") && LAST.get() == null) {
            what = "sign"; // this user has nothing to verify yet
        }
        r.setSampleLabel(what);
        try {
            Target t = target(c.getParameter("target"));
            byte[] content = new byte[Integer.parseInt(c.getParameter("bytes", "2048"))];
            ThreadLocalRandom.current().nextBytes(content);
            String signer = t.signers.get(ThreadLocalRandom.current().nextInt(t.signers.size()));
            Object document = YinjianClient.map("id", "ZY20261118000731", "type", "discharge-summary", "media_type", "application/octet-stream");
            Object consent = YinjianClient.map("method", "app-asserted", "assertion", "压力测试 load test");
            String key = "jmeter-" + RUN + "-" + SERIAL.incrementAndGet();
            String encoded = Base64.getEncoder().encodeToString(content);
            String path;
            Map<String, Object> body;
            switch (what) {
                case "batch":
                    path = "/v1/batches";
                    List<Object> items = new ArrayList<>();
                    for (int i = 0; i < Integer.parseInt(c.getParameter("batch", "10")); i++) {
                        items.add(YinjianClient.map("idempotency_key", key + "-" + i, "content", encoded, "document", document));
                    }
                    body = YinjianClient.map("signer", signer, "algorithm", "SM2", "form", "raw", "role", "主治医师", "consent", consent, "items", items);
                    break;
                case "verify":
                    path = "/v1/verify";
                    List<?> chain = (List<?>) LAST.get().get("certificates");
                    Map<String, Object> raw = YinjianClient.map("algorithm", "SM2", "value", LAST.get().get("signature"), "certificate", chain.get(0), "chain", chain.subList(1, chain.size()));
                    if (LAST.get().containsKey("token")) {
                        raw.put("token", LAST.get().get("token"));
                    }
                    body = YinjianClient.map("raw", raw, "document", LAST.get().get("content"));
                    break;
                case "timestamp":
                    path = "/v1/timestamp";
                    body = YinjianClient.map("data", encoded);
                    break;
                default:
                    path = "/v1/sign";
                    body = YinjianClient.map("signer", signer, "algorithm", "SM2", "form", "raw", "content", encoded, "document", document, "role", "主治医师", "consent", consent);
            }
            byte[] sent = YinjianClient.json(body);
            r.sampleStart();
            Map<String, Object> answer = post(t, r, path, sent, what.equals("sign") ? key : null);
            r.sampleEnd();
            boolean good = "200".equals(r.getResponseCode());
            if (good && what.equals("batch")) {
                for (Object item : (List<?>) answer.get("items")) {
                    Object p = ((Map<?, ?>) item).get("problem");
                    if (p != null) {
                        good = false;
                        r.setResponseMessage(String.valueOf(((Map<?, ?>) p).get("code")));
                    }
                }
            }
            if (good && what.equals("verify") && !Arrays.asList("valid", "indeterminate").contains(answer.get("verdict"))) {
                good = false;
                r.setResponseMessage("wrong_answer");
            }
            if (good && what.equals("sign")) {
                answer.put("content", encoded);
                LAST.set(answer);
            }
            r.setSuccessful(good);
        } catch (Exception e) {
            if (r.getStartTime() == 0) {
                r.sampleStart();
            }
            if (r.getEndTime() == 0) {
                r.sampleEnd();
            }
            r.setResponseCode("no_answer");
            r.setResponseMessage(e.toString());
            r.setSuccessful(false);
        }
        return r;
    }

    private static Map<String, Object> post(Target t, SampleResult r, String path, byte[] body, String key) throws IOException {
        int at = Math.floorMod(Thread.currentThread().getName().hashCode(), t.keys.size());
        String time = String.valueOf(System.currentTimeMillis());
        byte[] nonce = new byte[16];
        ThreadLocalRandom.current().nextBytes(nonce);
        HttpsURLConnection c = (HttpsURLConnection) new URL(t.api + path).openConnection();
        c.setSSLSocketFactory(t.tls);
        c.setConnectTimeout(5_000);
        c.setReadTimeout(45_000);
        c.setRequestMethod("POST");
        c.setRequestProperty("Content-Type", "application/json");
        if (key != null) {
            c.setRequestProperty("Idempotency-Key", key);
        }
        c.setRequestProperty("Authorization", YinjianClient.authorization(t.keys.get(at), "POST", path, "", t.host, t.applications.get(at), time, YinjianClient.hex(nonce), body));
        c.setDoOutput(true);
        c.setFixedLengthStreamingMode(body.length); // and so it is never sent again behind our back
        c.getOutputStream().write(body);
        int status = c.getResponseCode();
        byte[] answer;
        try (InputStream in = status / 100 == 2 ? c.getInputStream() : c.getErrorStream()) {
            ByteArrayOutputStream out = new ByteArrayOutputStream();
            byte[] part = new byte[8192];
            for (int n = in.read(part); n >= 0; n = in.read(part)) {
                out.write(part, 0, n);
            }
            answer = out.toByteArray();
        }
        r.setResponseCode(String.valueOf(status));
        r.setBytes(answer.length);
        Map<String, Object> said = YinjianClient.object(answer);
        r.setResponseMessage(status == 200 ? "OK" : String.valueOf(said.get("code")));
        return said;
    }
}
