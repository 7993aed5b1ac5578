// 印鉴接口的 C# 客户端：一个文件，C# 7.3，不依赖任何第三方库；为 .NET Framework 4.6.1 以上与 .NET 6 以上编写。
// A client of the appliance's API in one file: C# 7.3, no package, written for .NET Framework 4.6.1 or later and .NET 6 or
// later. Our tests build it with mcs and run it under Mono 6.8 alone. What is authenticated and how: docs/api-auth.md. What
// is retried and why: the table in docs/clients/README.md.
//
//   csc YinjianClient.cs          (Mono: mcs -langversion:7.2 YinjianClient.cs)
//   YinjianClient.exe vector  hmac-vector.json
//   YinjianClient.exe sign    KEY-FILE URL CA-FILE BODY-FILE IDEMPOTENCY-KEY
//   YinjianClient.exe example KEY-FILE URL CA-FILE SIGNER PIN-FILE DOCUMENT
//
// KEY-FILE 即设备写出的 credentials/<应用>.json. `vector` checks SM3 and HMAC on your machine, `sign` sends one request
// with its retries, `example` goes through everything below.
//
// TLS: the appliance speaks TLS 1.3 alone unless its configuration says listen.tls12 = true. .NET has TLS 1.3 where the
// system has it: Windows 11 and Server 2022 (.NET Framework from 4.8), Linux with OpenSSL 1.1.1. Elsewhere, and under
// Mono, the appliance needs listen.tls12.

using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading;

namespace Yinjian
{
    /// <summary>The appliance's refusal. Show Detail and Next to people, switch on Code, keep Instance for the administrator.</summary>
    public sealed class RefusedException : Exception
    {
        public readonly int Status;
        public readonly string Code;     // "pin_wrong"; "" when the answer is not the appliance's
        public readonly string Retry;    // never, resign, same-key, later or operator: docs/errors.md
        public readonly string Detail;   // reason, Chinese first
        public readonly string Next;     // what to do, Chinese first
        public readonly string Field;    // the request's field at fault, or ""
        public readonly string Instance; // the request's number in the appliance's log
        public readonly long? TriesLeft; // with pin_wrong
        public readonly TimeSpan RetryAfter;

        /// <summary>Whether this attempt or an earlier one may have signed nevertheless: call again with the same Idempotency-Key.</summary>
        public bool OutcomeUnknown { get; internal set; }

        internal RefusedException(int status, IDictionary<string, object> p, TimeSpan retryAfter)
            : base(Text(p, "code") + ": " + Text(p, "detail") + "; " + Text(p, "next") + " [" + status + " " + Text(p, "instance") + "]")
        {
            Status = status;
            Code = Text(p, "code");
            Retry = Text(p, "retry");
            Detail = Text(p, "detail");
            Next = Text(p, "next");
            Field = Text(p, "field");
            Instance = Text(p, "instance");
            TriesLeft = p.TryGetValue("tries_left", out object n) ? n as long? : null;
            RetryAfter = retryAfter;
        }

        internal bool Again => Retry == "same-key" || Retry == "later" || Retry == "resign";

        private static string Text(IDictionary<string, object> p, string name) => p.TryGetValue(name, out object v) && v is string s ? s : "";
    }

    /// <summary>No answer came. If OutcomeUnknown, the appliance may have signed: call again with the same Idempotency-Key.</summary>
    public sealed class NoAnswerException : Exception
    {
        public readonly bool OutcomeUnknown;

        internal NoAnswerException(bool outcomeUnknown, Exception cause)
            : base((outcomeUnknown ? "结果未知，请用同一个 Idempotency-Key 重试 (outcome unknown, call again with the same key): "
                : "请求未送达 (nothing was sent): ") + cause.Message, cause)
        {
            OutcomeUnknown = outcomeUnknown;
        }
    }

    /// <summary>Safe for concurrent use; one object serves the whole program.</summary>
    public sealed class YinjianClient
    {
        private const int MaxAttempts = 8;
        private const int MaxAnswer = 64 << 20;

        private readonly Uri address;
        private readonly string app;
        private readonly byte[] key;
        private readonly X509Certificate2Collection authorities;
        private readonly string group = "yinjian-" + Guid.NewGuid().ToString("N");

        /// <summary>To connect and send. .NET 6 does not tell these apart from the rest: there Attempt bounds all.</summary>
        public readonly TimeSpan Connect;

        /// <summary>One exchange, not shorter than the 30 s that the appliance may take.</summary>
        public readonly TimeSpan Attempt;

        /// <summary>All attempts and the pauses between them.</summary>
        public readonly TimeSpan Total;

        /// <param name="baseUrl">"https://yinjian.hospital.local:8443", without a path; the host must stand in the certificate</param>
        /// <param name="key">the HMAC-SM3 key, 32 bytes: hex-decoded from key_hex</param>
        /// <param name="caFile">PEM of the CA that the appliance's TLS certificate is under. Nothing else is trusted.</param>
        public YinjianClient(string baseUrl, string app, byte[] key, string caFile, TimeSpan? connect = null, TimeSpan? attempt = null, TimeSpan? total = null)
        {
            address = new Uri(baseUrl);
            if (address.Scheme != "https" || address.PathAndQuery != "/" || address.UserInfo != "" || address.Fragment != "")
            {
                throw new ArgumentException("baseUrl: want https://host[:port]");
            }
            this.app = app;
            this.key = (byte[])key.Clone();
            authorities = ReadPem(caFile);
            Connect = connect ?? TimeSpan.FromSeconds(5);
            Attempt = attempt ?? TimeSpan.FromSeconds(45);
            Total = total ?? TimeSpan.FromSeconds(120);
            AllowNewTls();
        }

        // ---- The routes. Requests are dictionaries as in openapi.json; byte[] becomes base64. ----

        /// <summary>
        /// Signs. The key (1-128 visible ASCII) names this act, for instance record number, version and purpose: store it
        /// before the call and use it again until you have the answer. However often it is sent, there is one record.
        /// </summary>
        public Dictionary<string, object> Sign(string idempotencyKey, Dictionary<string, object> request) => Json.Object(SignBytes(idempotencyKey, Json.Bytes(request)));

        private byte[] SignBytes(string idempotencyKey, byte[] body)
        {
            if (!Regex.IsMatch(idempotencyKey, @"\A[\x21-\x7e]{1,128}\z"))
            {
                throw new ArgumentException("idempotencyKey: want 1 to 128 visible ASCII characters");
            }
            return Call("POST", "/v1/sign", body, idempotencyKey, true);
        }

        /// <summary>Never sent twice: a wrong PIN counts. After NoAnswerException ask the signer for the PIN again.</summary>
        public Dictionary<string, object> Authorize(Dictionary<string, object> request) => Json.Object(Call("POST", "/v1/authorizations", Json.Bytes(request), null, false));

        /// <summary>The evidence of a record, byte for byte: store it as it is.</summary>
        public byte[] Evidence(string recordId)
        {
            if (!Regex.IsMatch(recordId, @"\A[0-9a-f]{64}\z"))
            {
                throw new ArgumentException("recordId: want 64 hexadecimal digits");
            }
            return Call("GET", "/v1/evidence/" + recordId, new byte[0], null, true);
        }

        public Dictionary<string, object> Verify(Dictionary<string, object> request) => Json.Object(Call("POST", "/v1/verify", Json.Bytes(request), null, true));

        /// <summary>A retry after a lost answer makes a second, equally good token.</summary>
        public Dictionary<string, object> Timestamp(Dictionary<string, object> request) => Json.Object(Call("POST", "/v1/timestamp", Json.Bytes(request), null, true));

        // ---- Sending ----

        private static readonly Random Jitter = new Random(); // guarded by itself

        // Sends a request, again while that may help and is safe: each attempt has the same Idempotency-Key and body, and a
        // new time and nonce. Pauses double from 200 ms to 5 s, with jitter, and are never shorter than Retry-After.
        private byte[] Call(string method, string path, byte[] body, string idempotencyKey, bool retry)
        {
            var clock = System.Diagnostics.Stopwatch.StartNew();
            bool unknown = false; // whether any attempt so far may have signed
            for (int attempt = 1; ; attempt++)
            {
                Exception failure;
                bool again;
                TimeSpan least = TimeSpan.Zero;
                TimeSpan left = Total - clock.Elapsed;
                try
                {
                    return Once(method, path, body, idempotencyKey, left < Attempt ? left : Attempt);
                }
                catch (RefusedException e)
                {
                    // replayed_request: something in between sent the request twice, and one copy came through.
                    unknown |= e.Retry == "same-key" || e.Code == "replayed_request" || e.Code == "" && e.Status / 100 != 4;
                    e.OutcomeUnknown = unknown;
                    failure = e;
                    again = e.Again;
                    least = e.RetryAfter;
                }
                catch (ExchangeException e)
                {
                    unknown |= e.Sent;
                    failure = new NoAnswerException(unknown, e.InnerException);
                    again = !e.Distrusted;
                }
                double pause = Math.Min(200 << Math.Min(attempt - 1, 6), 5000);
                lock (Jitter)
                {
                    pause = Math.Max(least.TotalMilliseconds, pause / 2 + Jitter.NextDouble() * pause / 2);
                }
                if (!retry || !again || attempt >= MaxAttempts || pause >= (Total - clock.Elapsed).TotalMilliseconds)
                {
                    throw failure;
                }
                Thread.Sleep((int)pause);
            }
        }

        // An exchange without an answer: whether the request may have arrived, and whether the other side was not believed.
        private sealed class ExchangeException : Exception
        {
            public readonly bool Sent, Distrusted;

            public ExchangeException(bool sent, bool distrusted, Exception cause) : base(cause.Message, cause)
            {
                Sent = sent;
                Distrusted = distrusted;
            }
        }

        private byte[] Once(string method, string path, byte[] body, string idempotencyKey, TimeSpan time)
        {
            bool rejected = false; // our own verdict on the certificate
            bool late = false;
            int milliseconds = Math.Max(1, (int)time.TotalMilliseconds);
#pragma warning disable SYSLIB0014 // HttpWebRequest is the one client that all these platforms have
            var request = (HttpWebRequest)WebRequest.Create(new Uri(address, path));
#pragma warning restore SYSLIB0014
            request.Method = method;
            request.ConnectionGroupName = group; // a connection that another client trusted is not ours
            request.Proxy = null; // the appliance is in the house
            request.AllowAutoRedirect = false;
            request.ServicePoint.Expect100Continue = false;
            request.ServicePoint.ConnectionLimit = Math.Max(request.ServicePoint.ConnectionLimit, 64); // 2 by default
            request.ReadWriteTimeout = milliseconds;
            request.ServerCertificateValidationCallback = (sender, certificate, chain, errors) =>
            {
                bool good = Trusted(certificate, chain, errors);
                rejected |= !good;
                return good;
            };
            request.Accept = "application/json";
            string now = DateTimeOffset.UtcNow.ToUnixTimeMilliseconds().ToString(CultureInfo.InvariantCulture);
            request.Headers["Authorization"] = Authorization(key, method, path, "", address.Authority, app, now, Nonce(), body);
            if (idempotencyKey != null)
            {
                request.Headers["Idempotency-Key"] = idempotencyKey;
            }
            // Timeout of HttpWebRequest ends with the answer's header; this is for all of it.
            using (new Timer(_ => { late = true; request.Abort(); }, null, milliseconds, System.Threading.Timeout.Infinite))
            {
                bool connected = false;
                try
                {
                    if (body.Length > 0)
                    {
                        request.ContentType = "application/json";
                        request.ContentLength = body.Length;
                        // Without this a request is silently sent again when a kept connection turns out closed, with
                        // the same nonce, which the appliance refuses as replayed_request.
                        request.AllowWriteStreamBuffering = false;
                        request.Timeout = Math.Max(1, (int)Math.Min(Connect.TotalMilliseconds, milliseconds));
                        using (Stream stream = request.GetRequestStream())
                        {
                            connected = true;
                            stream.Write(body, 0, body.Length);
                        }
                    }
                    request.Timeout = milliseconds;
                    using (var response = (HttpWebResponse)request.GetResponse())
                    {
                        return Answer(response);
                    }
                }
                catch (WebException e) when (e.Response is HttpWebResponse)
                {
                    try
                    {
                        using (var response = (HttpWebResponse)e.Response)
                        {
                            return Answer(response);
                        }
                    }
                    catch (Exception cut) when (cut is IOException || cut is WebException)
                    {
                        throw new ExchangeException(true, false, cut);
                    }
                }
                catch (WebException e)
                {
                    bool handshake = rejected || e.Status == WebExceptionStatus.TrustFailure || e.Status == WebExceptionStatus.SecureChannelFailure;
                    bool unsent = handshake || e.Status == WebExceptionStatus.ConnectFailure || e.Status == WebExceptionStatus.NameResolutionFailure
                        || e.Status == WebExceptionStatus.Timeout && body.Length > 0 && !connected;
                    throw new ExchangeException(!unsent, handshake, late ? new TimeoutException("no answer within " + milliseconds + " ms") : (Exception)e);
                }
                catch (Exception e) when (e is IOException || e is ObjectDisposedException || e is InvalidOperationException)
                {
                    throw new ExchangeException(true, rejected, late ? new TimeoutException("no answer within " + milliseconds + " ms") : e);
                }
            }
        }

        private static byte[] Answer(HttpWebResponse response)
        {
            byte[] answer;
            using (Stream stream = response.GetResponseStream())
            using (var all = new MemoryStream())
            {
                var buffer = new byte[8192];
                for (int n; (n = stream.Read(buffer, 0, buffer.Length)) > 0;)
                {
                    all.Write(buffer, 0, n);
                    if (all.Length > MaxAnswer)
                    {
                        throw new IOException("answer too large");
                    }
                }
                answer = all.ToArray();
            }
            if (response.ContentLength >= 0 && response.ContentLength != answer.Length)
            {
                throw new IOException("the answer was cut off");
            }
            int status = (int)response.StatusCode;
            string type = response.ContentType ?? "";
            if (status == 200 && type.StartsWith("application/json", StringComparison.Ordinal))
            {
                return answer;
            }
            Dictionary<string, object> problem = null;
            if (type.StartsWith("application/problem+json", StringComparison.Ordinal))
            {
                try
                {
                    problem = Json.Object(answer);
                }
                catch (FormatException)
                {
                    problem = null; // an answer of something in between: judged by its status
                }
            }
            if (problem == null)
            {
                problem = Json.Map(
                    "detail", "不是设备的回答 (not the appliance's answer): " + type,
                    "next", "请检查地址与中间的代理 (check the address and what stands in between)",
                    "retry", status == 429 ? "later" : status >= 502 && status <= 504 ? "same-key" : "never");
            }
            // RFC 9110 §10.2.3, in seconds, as the appliance sends it.
            string after = response.Headers["Retry-After"] ?? "";
            throw new RefusedException(status, problem,
                TimeSpan.FromSeconds(Regex.IsMatch(after, @"\A[0-9]{1,6}\z") ? int.Parse(after, CultureInfo.InvariantCulture) : 0));
        }

        // ---- TLS: trusted is what leads to a certificate of the CA file, for this host, and nothing else. ----

        private static X509Certificate2Collection ReadPem(string file)
        {
            var found = new X509Certificate2Collection();
            foreach (Match m in Regex.Matches(File.ReadAllText(file), "-----BEGIN CERTIFICATE-----([^-]+)-----END CERTIFICATE-----"))
            {
                found.Add(new X509Certificate2(Convert.FromBase64String(m.Groups[1].Value)));
            }
            if (found.Count == 0)
            {
                throw new ArgumentException(file + " holds no certificate");
            }
            return found;
        }

        private bool Trusted(X509Certificate certificate, X509Chain given, SslPolicyErrors errors)
        {
            // The chain is judged below, by our CAs; a wrong host name stays wrong. Mono 6.8 does not report it to a callback
            // like this one, so we look ourselves.
            if (certificate == null || (errors & ~SslPolicyErrors.RemoteCertificateChainErrors) != SslPolicyErrors.None
                || !IsFor(new X509Certificate2(certificate), address.DnsSafeHost))
            {
                return false;
            }
            using (var chain = new X509Chain())
            {
                chain.ChainPolicy.RevocationMode = X509RevocationMode.NoCheck; // a house CA has no list that Windows could fetch
                // Our CA need not be in Windows' store. This flag forgives that alone, and hence that the chain leads to
                // any other root: so below one of ours must be in it.
                chain.ChainPolicy.VerificationFlags = X509VerificationFlags.AllowUnknownCertificateAuthority;
                chain.ChainPolicy.ExtraStore.AddRange(authorities);
                if (given != null)
                {
                    foreach (X509ChainElement e in given.ChainElements)
                    {
                        chain.ChainPolicy.ExtraStore.Add(e.Certificate);
                    }
                }
                if (!chain.Build(new X509Certificate2(certificate)))
                {
                    return false;
                }
                for (int i = 1; i < chain.ChainElements.Count; i++)
                {
                    foreach (X509Certificate2 ours in authorities)
                    {
                        if (Convert.ToBase64String(ours.RawData) == Convert.ToBase64String(chain.ChainElements[i].Certificate.RawData))
                        {
                            return true;
                        }
                    }
                }
                return false;
            }
        }

        // RFC 9525: the host stands in subjectAltName (RFC 5280 §4.2.1.6), as a name or as an address; the common name does
        // not count. A star stands for the whole first label.
        private static bool IsFor(X509Certificate2 certificate, string host)
        {
            X509Extension names = certificate.Extensions["2.5.29.17"];
            if (names == null)
            {
                return false;
            }
            IPAddress ip;
            string address = IPAddress.TryParse(host, out ip) ? Hex(ip.GetAddressBytes()) : null;
            byte[] der = names.RawData;
            int at = 0;
            if (der.Length == 0 || der[at++] != 0x30 || Length(der, ref at) != der.Length - at)
            {
                return false;
            }
            while (at < der.Length)
            {
                byte tag = der[at++];
                int length = Length(der, ref at);
                if (length < 0 || length > der.Length - at)
                {
                    return false;
                }
                var value = new byte[length];
                Array.Copy(der, at, value, 0, length);
                at += length;
                if (tag == 0x87 && address != null && Hex(value) == address)
                {
                    return true;
                }
                if (tag == 0x82 && address == null)
                {
                    string name = Encoding.ASCII.GetString(value);
                    int dot = host.IndexOf('.');
                    string rest = name.StartsWith("*.", StringComparison.Ordinal) && dot > 0 ? host.Substring(dot) : null;
                    if (string.Equals(name, host, StringComparison.OrdinalIgnoreCase)
                        || rest != null && string.Equals(name.Substring(1), rest, StringComparison.OrdinalIgnoreCase))
                    {
                        return true;
                    }
                }
            }
            return false;
        }

        // A DER length of at most two bytes, or -1.
        private static int Length(byte[] der, ref int at)
        {
            int first = at < der.Length ? der[at++] : 0x84;
            int more = first - 0x80;
            if (more < 0)
            {
                return first;
            }
            if (more != 1 && more != 2 || more > der.Length - at)
            {
                return -1;
            }
            int length = 0;
            for (; more > 0; more--)
            {
                length = length << 8 | der[at++];
            }
            return length;
        }

        // Before 4.7 .NET Framework offers TLS 1.0 and leaves out what is newer. Where the system decides, it keeps doing so.
        private static void AllowNewTls()
        {
            foreach (int version in new[] { 3072, 12288 }) // TLS 1.2, TLS 1.3
            {
                if (ServicePointManager.SecurityProtocol == 0)
                {
                    return;
                }
                try
                {
                    ServicePointManager.SecurityProtocol |= (SecurityProtocolType)version;
                }
                catch (NotSupportedException)
                {
                    return; // this system has no TLS 1.3
                }
            }
        }

        // ---- docs/api-auth.md ----

        /// <summary>The Authorization header's value.</summary>
        public static string Authorization(byte[] key, string method, string path, string query, string host, string app, string time, string nonce, byte[] body)
        {
            string[] pieces = query.Split('&');
            Array.Sort(pieces, StringComparer.Ordinal);
            var lower = new StringBuilder();
            foreach (char c in host)
            {
                lower.Append(c >= 'A' && c <= 'Z' ? (char)(c + 32) : c);
            }
            string text = string.Join("\n", "YJ1-HMAC-SM3", method, path, string.Join("&", pieces), lower.ToString(), app, time, nonce, Hex(Sm3(body)));
            return "YJ1-HMAC-SM3 app=" + app + ",time=" + time + ",nonce=" + nonce + ",sig=" + Convert.ToBase64String(HmacSm3(key, Encoding.UTF8.GetBytes(text)));
        }

        private static string Nonce()
        {
            var random = new byte[18];
            using (var source = RandomNumberGenerator.Create())
            {
                source.GetBytes(random);
            }
            return Convert.ToBase64String(random).Replace('+', '-').Replace('/', '_');
        }

        /// <summary>RFC 2104 with SM3: block 64 bytes, output 32 bytes.</summary>
        public static byte[] HmacSm3(byte[] key, byte[] message)
        {
            byte[] k = key.Length > 64 ? Sm3(key) : key;
            var inner = new byte[64 + message.Length];
            var outer = new byte[64 + 32];
            for (int i = 0; i < 64; i++)
            {
                byte b = i < k.Length ? k[i] : (byte)0;
                inner[i] = (byte)(b ^ 0x36);
                outer[i] = (byte)(b ^ 0x5c);
            }
            message.CopyTo(inner, 64);
            Sm3(inner).CopyTo(outer, 64);
            return Sm3(outer);
        }

        /// <summary>GB/T 32905-2016.</summary>
        public static byte[] Sm3(byte[] message)
        {
            unchecked
            {
                uint[] v = { 0x7380166f, 0x4914b2b9, 0x172442d7, 0xda8a0600, 0xa96f30bc, 0x163138aa, 0xe38dee4d, 0xb0fb0e4e };
                var w = new uint[68];
                int whole = message.Length / 64 * 64, rest = message.Length - whole;
                for (int i = 0; i < whole; i += 64)
                {
                    Compress(v, w, message, i);
                }
                // §5.2: a one bit, zeros, and the length in bits.
                var tail = new byte[rest < 56 ? 64 : 128];
                Array.Copy(message, whole, tail, 0, rest);
                tail[rest] = 0x80;
                ulong bits = 8UL * (ulong)message.Length;
                for (int i = 0; i < 8; i++)
                {
                    tail[tail.Length - 1 - i] = (byte)(bits >> 8 * i);
                }
                for (int i = 0; i < tail.Length; i += 64)
                {
                    Compress(v, w, tail, i);
                }
                var result = new byte[32];
                for (int i = 0; i < 32; i++)
                {
                    result[i] = (byte)(v[i / 4] >> 24 - 8 * (i % 4));
                }
                return result;
            }
        }

        private static uint Rotate(uint x, int n) => x << n | x >> 32 - n; // C# takes shifts modulo 32: n = 0 is right

        // §5.3.2 and §5.3.3.
        private static void Compress(uint[] v, uint[] w, byte[] block, int at)
        {
            unchecked
            {
                for (int j = 0; j < 16; j++)
                {
                    int i = at + 4 * j;
                    w[j] = (uint)(block[i] << 24 | block[i + 1] << 16 | block[i + 2] << 8 | block[i + 3]);
                }
                for (int j = 16; j < 68; j++)
                {
                    uint x = w[j - 16] ^ w[j - 9] ^ Rotate(w[j - 3], 15);
                    w[j] = x ^ Rotate(x, 15) ^ Rotate(x, 23) ^ Rotate(w[j - 13], 7) ^ w[j - 6];
                }
                uint a = v[0], b = v[1], c = v[2], d = v[3], e = v[4], f = v[5], g = v[6], h = v[7];
                for (int j = 0; j < 64; j++)
                {
                    uint a12 = Rotate(a, 12);
                    uint ss1 = Rotate(a12 + e + Rotate(j < 16 ? 0x79cc4519u : 0x7a879d8au, j % 32), 7);
                    uint ff = j < 16 ? a ^ b ^ c : a & b | a & c | b & c;
                    uint gg = j < 16 ? e ^ f ^ g : e & f | ~e & g;
                    uint tt1 = ff + d + (ss1 ^ a12) + (w[j] ^ w[j + 4]);
                    uint tt2 = gg + h + ss1 + w[j];
                    d = c;
                    c = Rotate(b, 9);
                    b = a;
                    a = tt1;
                    h = g;
                    g = Rotate(f, 19);
                    f = e;
                    e = tt2 ^ Rotate(tt2, 9) ^ Rotate(tt2, 17);
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
        }

        public static string Hex(byte[] bytes) => BitConverter.ToString(bytes).Replace("-", "").ToLowerInvariant();

        public static byte[] Unhex(string s)
        {
            if (!Regex.IsMatch(s, @"\A([0-9A-Fa-f]{2})+\z"))
            {
                throw new ArgumentException("not hexadecimal");
            }
            var result = new byte[s.Length / 2];
            for (int i = 0; i < result.Length; i++)
            {
                result[i] = byte.Parse(s.Substring(2 * i, 2), NumberStyles.HexNumber, CultureInfo.InvariantCulture);
            }
            return result;
        }

        // ---- The command ----

        /// <summary>Reads credentials/APP.json and makes a client of it. The environment may change the times, in seconds.</summary>
        public static YinjianClient Open(string keyFile, string url, string caFile)
        {
            Dictionary<string, object> credentials = Json.Object(File.ReadAllBytes(keyFile));
            return new YinjianClient(url, (string)credentials["application"], Unhex((string)credentials["key_hex"]), caFile,
                Seconds("YINJIAN_CONNECT_SECONDS"), Seconds("YINJIAN_ATTEMPT_SECONDS"), Seconds("YINJIAN_TOTAL_SECONDS"));
        }

        private static TimeSpan? Seconds(string name)
        {
            string s = Environment.GetEnvironmentVariable(name);
            return string.IsNullOrEmpty(s) ? (TimeSpan?)null : TimeSpan.FromSeconds(int.Parse(s, CultureInfo.InvariantCulture));
        }

        /// <summary>Exits 0, 1 (vector differs), 2 (misused), 3 (nothing was signed) or 4 (outcome unknown: run again, same key).</summary>
        public static int Main(string[] args)
        {
            Console.OutputEncoding = new UTF8Encoding(false);
            try
            {
                if (args.Length == 2 && args[0] == "vector")
                {
                    return Vector(args[1]) ? 0 : 1;
                }
                if (args.Length == 6 && args[0] == "sign")
                {
                    Console.WriteLine(Encoding.UTF8.GetString(Open(args[1], args[2], args[3]).SignBytes(args[5], File.ReadAllBytes(args[4]))));
                    return 0;
                }
                if (args.Length == 7 && args[0] == "example")
                {
                    Example(Open(args[1], args[2], args[3]), args[4], File.ReadAllText(args[5]).Trim(), File.ReadAllBytes(args[6]));
                    return 0;
                }
                Console.Error.WriteLine("usage: YinjianClient vector FILE | sign KEY-FILE URL CA-FILE BODY-FILE IDEMPOTENCY-KEY"
                    + " | example KEY-FILE URL CA-FILE SIGNER PIN-FILE DOCUMENT");
                return 2;
            }
            catch (RefusedException e)
            {
                Console.Error.WriteLine("refused: " + e.Message);
                return e.OutcomeUnknown ? 4 : 3;
            }
            catch (NoAnswerException e)
            {
                Console.Error.WriteLine("no answer: " + e.Message);
                return e.OutcomeUnknown ? 4 : 3;
            }
            catch (Exception e) when (e is ArgumentException || e is IOException || e is FormatException || e is KeyNotFoundException)
            {
                Console.Error.WriteLine(e.Message);
                return 2;
            }
        }

        private static bool Vector(string file)
        {
            bool good = true;
            foreach (Dictionary<string, object> v in (List<object>)Json.Object(File.ReadAllBytes(file))["vectors"])
            {
                Func<string, string> Of = name => (string)v[name]; // mcs knows no local functions
                string got = Authorization(Unhex(Of("key_hex")), Of("method"), Of("path"), Of("query"), Of("host"), Of("app"), Of("time"), Of("nonce"),
                    Encoding.UTF8.GetBytes(Of("body")));
                Console.WriteLine(got);
                good &= got == Of("authorization");
            }
            return good;
        }

        // Everything an application does, in its order.
        private static void Example(YinjianClient c, string signer, string pin, byte[] document)
        {
            string visit = "example-" + Nonce(); // yours: the record's number and version, stored before the call
            Dictionary<string, object> description = Json.Map("id", visit, "type", "discharge-summary", "media_type", "application/xml");

            // 1. Consent by PIN, bound to this document: SM3 for SM2.
            Dictionary<string, object> once = c.Authorize(Json.Map("signer", signer, "pin", pin, "digests", new List<object> { Sm3(document) }));
            Console.WriteLine("authorization " + once["id"]);

            // 2. A raw SM2 signature, over content.
            Dictionary<string, object> raw = c.Sign(visit + "-raw", Json.Map(
                "signer", signer, "algorithm", "SM2", "form", "raw", "content", document, "document", description,
                "role", "主治医师", "consent", Json.Map("authorization_id", once["id"])));
            Console.WriteLine("raw " + raw["record_id"]);

            // 3. Two CMS, of a digest alone and with the content inside; consent for two signatures within ten minutes.
            Dictionary<string, object> twice = c.Authorize(Json.Map("signer", signer, "pin", pin, "count", 2, "seconds", 600));
            Dictionary<string, object> request = Json.Map(
                "signer", signer, "algorithm", "SM2", "form", "cms", "document", description,
                "role", "主治医师", "consent", Json.Map("authorization_id", twice["id"]));
            request["digest"] = Json.Map("algorithm", "SM3", "value", Sm3(document));
            Dictionary<string, object> cms = c.Sign(visit + "-cms", request);
            Console.WriteLine("cms " + cms["record_id"]);
            request.Remove("digest");
            request["content"] = document;
            request["detached"] = false;
            Dictionary<string, object> inside = c.Sign(visit + "-cms-content", request);
            Console.WriteLine("cms-content " + inside["record_id"]);

            // 4. The evidence, to be stored beside the record, and the appliance's opinion of it and of the CMS.
            byte[] evidence = c.Evidence((string)cms["record_id"]);
            Console.WriteLine("evidence " + evidence.Length + " bytes");
            Console.WriteLine("verify evidence " + c.Verify(Json.Map("evidence", new Verbatim(evidence), "document", document))["verdict"]);
            Console.WriteLine("verify cms " + c.Verify(Json.Map("cms", Convert.FromBase64String((string)cms["signature"]), "document", document))["verdict"]);

            // 5. A time-stamp by itself.
            Dictionary<string, object> stamp = c.Timestamp(Json.Map("digest", Json.Map("algorithm", "SM3", "value", Sm3(document))));
            Console.WriteLine("timestamp " + stamp["gen_time"]);

            // 6. The same act again gives the same record.
            Dictionary<string, object> again = c.Sign(visit + "-cms-content", request);
            Console.WriteLine("again " + again["record_id"] + " replayed " + ((bool)again["replayed"] ? "true" : "false"));
        }
    }

    /// <summary>JSON that is passed on byte for byte: an evidence file in a request to verify.</summary>
    public sealed class Verbatim
    {
        internal readonly string Text;

        public Verbatim(byte[] json)
        {
            Text = Encoding.UTF8.GetString(json);
        }
    }

    /// <summary>RFC 8259, as much as is needed. Use your own library's instead if you have one.</summary>
    public static class Json
    {
        /// <summary>Map("a", 1, "b", Map(...)); a value that is null is left out, since the appliance refuses null.</summary>
        public static Dictionary<string, object> Map(params object[] namesAndValues)
        {
            var m = new Dictionary<string, object>();
            for (int i = 0; i < namesAndValues.Length; i += 2)
            {
                if (namesAndValues[i + 1] != null)
                {
                    m[(string)namesAndValues[i]] = namesAndValues[i + 1];
                }
            }
            return m;
        }

        /// <summary>Dictionaries, lists, strings, whole numbers, booleans, byte[] (as base64) and Verbatim.</summary>
        public static byte[] Bytes(object value)
        {
            var text = new StringBuilder();
            Write(text, value);
            return Encoding.UTF8.GetBytes(text.ToString());
        }

        private static void Write(StringBuilder text, object value)
        {
            string separator = "";
            if (value is Dictionary<string, object> map)
            {
                text.Append('{');
                foreach (KeyValuePair<string, object> e in map)
                {
                    text.Append(separator);
                    Write(text, e.Key);
                    text.Append(':');
                    Write(text, e.Value);
                    separator = ",";
                }
                text.Append('}');
            }
            else if (value is List<object> list)
            {
                text.Append('[');
                foreach (object item in list)
                {
                    text.Append(separator);
                    Write(text, item);
                    separator = ",";
                }
                text.Append(']');
            }
            else if (value is byte[] bytes)
            {
                text.Append('"').Append(Convert.ToBase64String(bytes)).Append('"');
            }
            else if (value is string s)
            {
                text.Append('"');
                foreach (char c in s)
                {
                    if (c == '"' || c == '\\')
                    {
                        text.Append('\\').Append(c);
                    }
                    else if (c < ' ')
                    {
                        text.Append("\\u").Append(((int)c).ToString("x4", CultureInfo.InvariantCulture));
                    }
                    else
                    {
                        text.Append(c);
                    }
                }
                text.Append('"');
            }
            else if (value is Verbatim)
            {
                text.Append(((Verbatim)value).Text);
            }
            else if (value is bool)
            {
                text.Append((bool)value ? "true" : "false");
            }
            else if (value is int || value is long)
            {
                text.Append(Convert.ToString(value, CultureInfo.InvariantCulture));
            }
            else
            {
                throw new ArgumentException("no JSON for " + value);
            }
        }

        /// <summary>Objects become dictionaries, arrays lists, whole numbers long, other numbers double. FormatException otherwise.</summary>
        public static Dictionary<string, object> Object(byte[] json)
        {
            var p = new Parser(Encoding.UTF8.GetString(json));
            return p.Whole() as Dictionary<string, object> ?? throw new FormatException("JSON: not an object");
        }

        private sealed class Parser
        {
            private readonly string s;
            private int at, depth;

            public Parser(string s)
            {
                this.s = s;
            }

            public object Whole()
            {
                object v = Value();
                if (!Take("") || at != s.Length)
                {
                    throw Bad();
                }
                return v;
            }

            private FormatException Bad() => new FormatException("JSON: unexpected at character " + at);

            // Skips white space, then the word if it is there.
            private bool Take(string word)
            {
                while (at < s.Length && " \t\r\n".IndexOf(s[at]) >= 0)
                {
                    at++;
                }
                bool there = string.CompareOrdinal(s, at, word, 0, word.Length) == 0;
                at += there ? word.Length : 0;
                return there;
            }

            private void Want(string word)
            {
                if (!Take(word))
                {
                    throw Bad();
                }
            }

            private object Value()
            {
                if (++depth > 64)
                {
                    throw Bad();
                }
                object v = Take("{") ? Members() : Take("[") ? Items() : Take("\"") ? Text()
                    : Take("true") ? true : Take("false") ? false : Take("null") ? null : Number();
                depth--;
                return v;
            }

            private object Members()
            {
                var m = new Dictionary<string, object>();
                if (Take("}"))
                {
                    return m;
                }
                do
                {
                    Want("\"");
                    string name = Text();
                    Want(":");
                    m[name] = Value();
                }
                while (Take(","));
                Want("}");
                return m;
            }

            private object Items()
            {
                var l = new List<object>();
                if (Take("]"))
                {
                    return l;
                }
                do
                {
                    l.Add(Value());
                }
                while (Take(","));
                Want("]");
                return l;
            }

            private object Number()
            {
                int begin = at;
                while (at < s.Length && "+-.eE0123456789".IndexOf(s[at]) >= 0)
                {
                    at++;
                }
                string n = s.Substring(begin, at - begin);
                if (long.TryParse(n, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long whole))
                {
                    return whole;
                }
                if (double.TryParse(n, NumberStyles.Float, CultureInfo.InvariantCulture, out double broken))
                {
                    return broken;
                }
                throw Bad();
            }

            private string Text()
            {
                var text = new StringBuilder();
                while (at < s.Length)
                {
                    char c = s[at++];
                    if (c == '"')
                    {
                        return text.ToString();
                    }
                    if (c != '\\')
                    {
                        text.Append(c);
                        continue;
                    }
                    char kind = at < s.Length ? s[at++] : '\0';
                    int plain = "\"\\/bfnrt".IndexOf(kind);
                    if (plain >= 0)
                    {
                        text.Append("\"\\/\b\f\n\r\t"[plain]);
                    }
                    else if (kind == 'u' && at + 4 <= s.Length
                        && ushort.TryParse(s.Substring(at, 4), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ushort code))
                    {
                        text.Append((char)code);
                        at += 4;
                    }
                    else
                    {
                        throw Bad();
                    }
                }
                throw Bad();
            }
        }
    }
}
