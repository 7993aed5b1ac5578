// BCCheck is the judge from outside: Bouncy Castle (written for 1.72, Debian's libbcprov-java, libbcpkix-java and
// libbcutil-java) verifies what we sign and stamp, and signs and stamps what we verify. Tests compile it into a temporary
// folder.
//
//   java -cp CLASSES:bcprov.jar:bcpkix.jar:bcutil.jar BCCheck COMMAND ...
//
//   tst    RESP.tsr REQ.tsq TSA.pem       TimeStampResponse.validate against the request, TimeStampToken.validate
//   tsts   REQ.tsq TSA.pem RESP.tsr...    the same for many: of each, "NAME plain|mapped valid" or why not; mapped: told
//                                         that 1.2.156.10197.1.301.1 is a signature by SM2
//   cms    MESSAGE SIGNER.pem [CONTENT]   every signer verifies; CONTENT for a detached message
//   cmsts  MESSAGE TSA.pem                the signature-time-stamp attribute's token is valid and stamps the signature
//   sign   KEY.pem SIGNER.pem CONTENT OUT attached|detached   make a SignedData (SM3 with SM2, or SHA-256 with RSA)
//   stamp  KEY.pem TSA.pem REQ.tsq OUT    make a TimeStampResp
//
// Files are DER but for the PEM ones. A success prints one line beginning with OK and exits 0; anything else prints the
// reason to stderr and exits 1; a wrong command line exits 2.

import java.io.FileReader;
import java.math.BigInteger;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.security.MessageDigest;
import java.security.PrivateKey;
import java.security.Security;
import java.util.Arrays;
import java.util.Collections;
import java.util.Date;
import java.util.HashSet;
import java.util.Set;

import org.bouncycastle.asn1.ASN1Encodable;
import org.bouncycastle.asn1.ASN1ObjectIdentifier;
import org.bouncycastle.asn1.ASN1Primitive;
import org.bouncycastle.asn1.cms.Attribute;
import org.bouncycastle.asn1.pkcs.PKCSObjectIdentifiers;
import org.bouncycastle.asn1.pkcs.PrivateKeyInfo;
import org.bouncycastle.asn1.x509.AlgorithmIdentifier;
import org.bouncycastle.cert.X509CertificateHolder;
import org.bouncycastle.cms.CMSProcessableByteArray;
import org.bouncycastle.cms.CMSSignedData;
import org.bouncycastle.cms.CMSSignedDataGenerator;
import org.bouncycastle.cms.DefaultCMSSignatureAlgorithmNameGenerator;
import org.bouncycastle.cms.SignerInformation;
import org.bouncycastle.cms.SignerInformationVerifier;
import org.bouncycastle.cms.SignerInfoGenerator;
import org.bouncycastle.cms.SignerInfoGeneratorBuilder;
import org.bouncycastle.cms.jcajce.JcaSimpleSignerInfoVerifierBuilder;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.openssl.PEMParser;
import org.bouncycastle.openssl.jcajce.JcaPEMKeyConverter;
import org.bouncycastle.operator.DefaultSignatureAlgorithmIdentifierFinder;
import org.bouncycastle.operator.DigestCalculatorProvider;
import org.bouncycastle.operator.jcajce.JcaContentSignerBuilder;
import org.bouncycastle.operator.jcajce.JcaContentVerifierProviderBuilder;
import org.bouncycastle.operator.jcajce.JcaDigestCalculatorProviderBuilder;
import org.bouncycastle.tsp.TimeStampRequest;
import org.bouncycastle.tsp.TimeStampResponse;
import org.bouncycastle.tsp.TimeStampResponseGenerator;
import org.bouncycastle.tsp.TimeStampToken;
import org.bouncycastle.tsp.TimeStampTokenGenerator;
import org.bouncycastle.util.CollectionStore;

public class BCCheck {
    static final ASN1ObjectIdentifier SHA256 = new ASN1ObjectIdentifier("2.16.840.1.101.3.4.2.1");
    static final ASN1ObjectIdentifier SM3 = new ASN1ObjectIdentifier("1.2.156.10197.1.401");
    static final String GM_SM2_SIGN = "1.2.156.10197.1.301.1";

    // GM/T 0010 writes SM2 signatures as 301.1, which Bouncy Castle 1.72 does not know by itself.
    static class Names extends DefaultCMSSignatureAlgorithmNameGenerator {
        Names() {
            setSigningEncryptionAlgorithmMapping(new ASN1ObjectIdentifier(GM_SM2_SIGN), "SM2");
        }
    }

    static byte[] read(String path) throws Exception {
        return Files.readAllBytes(Paths.get(path));
    }

    static X509CertificateHolder certificate(String path) throws Exception {
        try (PEMParser p = new PEMParser(new FileReader(path))) {
            return (X509CertificateHolder) p.readObject();
        }
    }

    static PrivateKey key(String path) throws Exception {
        try (PEMParser p = new PEMParser(new FileReader(path))) {
            return new JcaPEMKeyConverter().setProvider("BC").getPrivateKey((PrivateKeyInfo) p.readObject());
        }
    }

    static DigestCalculatorProvider digests() throws Exception {
        return new JcaDigestCalculatorProviderBuilder().setProvider("BC").build();
    }

    static SignerInformationVerifier verifier(X509CertificateHolder cert) throws Exception {
        return new SignerInformationVerifier(new Names(), new DefaultSignatureAlgorithmIdentifierFinder(),
            new JcaContentVerifierProviderBuilder().setProvider("BC").build(cert), digests());
    }

    static String tsts(String[] a) throws Exception {
        StringBuilder out = new StringBuilder("OK " + (a.length - 3) + " responses\n");
        X509CertificateHolder cert = certificate(a[2]);
        SignerInformationVerifier plain = new JcaSimpleSignerInfoVerifierBuilder().setProvider("BC").build(cert);
        for (String path : Arrays.copyOfRange(a, 3, a.length)) {
            for (boolean mapped : new boolean[] {false, true}) {
                out.append(Paths.get(path).getFileName()).append(mapped ? " mapped " : " plain ");
                try {
                    TimeStampResponse response = new TimeStampResponse(read(path));
                    response.validate(new TimeStampRequest(read(a[1])));
                    response.getTimeStampToken().validate(mapped ? verifier(cert) : plain);
                    out.append("valid\n");
                } catch (Exception e) {
                    out.append(e).append("\n");
                }
            }
        }
        return out.toString();
    }

    static void must(boolean ok, String what) {
        if (!ok) {
            throw new IllegalStateException(what);
        }
    }

    static String tst(String[] a) throws Exception {
        TimeStampResponse response = new TimeStampResponse(read(a[1]));
        response.validate(new TimeStampRequest(read(a[2])));
        TimeStampToken token = response.getTimeStampToken();
        must(token != null, "no token: status " + response.getStatus() + " " + response.getStatusString());
        token.validate(verifier(certificate(a[3])));
        return "OK serial " + token.getTimeStampInfo().getSerialNumber().toString(16) + " genTime "
            + token.getTimeStampInfo().getGenTime().getTime();
    }

    static String cms(String[] a) throws Exception {
        CMSSignedData message = a.length == 4
            ? new CMSSignedData(new CMSProcessableByteArray(read(a[3])), read(a[1]))
            : new CMSSignedData(read(a[1]));
        must(message.getSignedContent() != null, "no content");
        int n = 0;
        for (SignerInformation signer : message.getSignerInfos().getSigners()) {
            must(signer.verify(verifier(certificate(a[2]))), "signature does not verify");
            n++;
        }
        must(n > 0, "no signer");
        return "OK " + n + " signer";
    }

    static String cmsts(String[] a) throws Exception {
        CMSSignedData message = new CMSSignedData(read(a[1]));
        int n = 0;
        for (SignerInformation signer : message.getSignerInfos().getSigners()) {
            must(signer.getUnsignedAttributes() != null, "no unsigned attributes");
            Attribute attribute = signer.getUnsignedAttributes().get(PKCSObjectIdentifiers.id_aa_signatureTimeStampToken);
            must(attribute != null, "no signature-time-stamp attribute");
            for (ASN1Encodable value : attribute.getAttributeValues()) {
                TimeStampToken token = new TimeStampToken(new CMSSignedData(value.toASN1Primitive().getEncoded()));
                token.validate(verifier(certificate(a[2])));
                String algorithm = token.getTimeStampInfo().getMessageImprintAlgOID().getId();
                byte[] digest = MessageDigest.getInstance(algorithm, "BC").digest(signer.getSignature());
                must(Arrays.equals(digest, token.getTimeStampInfo().getMessageImprintDigest()), "token stamps something else");
                n++;
            }
        }
        must(n > 0, "no token");
        return "OK " + n + " token";
    }

    static SignerInfoGenerator signer(String keyPath, X509CertificateHolder cert) throws Exception {
        PrivateKey key = key(keyPath);
        String algorithm = key.getAlgorithm().equals("RSA") ? "SHA256withRSA" : "SM3withSM2";
        return new SignerInfoGeneratorBuilder(digests())
            .build(new JcaContentSignerBuilder(algorithm).setProvider("BC").build(key), cert);
    }

    static void writeDER(String path, byte[] encoded) throws Exception {
        Files.write(Paths.get(path), ASN1Primitive.fromByteArray(encoded).getEncoded("DER"));
    }

    static String sign(String[] a) throws Exception {
        X509CertificateHolder cert = certificate(a[2]);
        CMSSignedDataGenerator generator = new CMSSignedDataGenerator();
        generator.addSignerInfoGenerator(signer(a[1], cert));
        generator.addCertificates(new CollectionStore<>(Collections.singletonList(cert)));
        CMSSignedData message = generator.generate(new CMSProcessableByteArray(read(a[3])), a[5].equals("attached"));
        writeDER(a[4], message.getEncoded());
        return "OK signed";
    }

    static String stamp(String[] a) throws Exception {
        X509CertificateHolder cert = certificate(a[2]);
        TimeStampRequest request = new TimeStampRequest(read(a[3]));
        ASN1ObjectIdentifier digest = key(a[1]).getAlgorithm().equals("RSA") ? SHA256 : SM3;
        TimeStampTokenGenerator tokens = new TimeStampTokenGenerator(signer(a[1], cert),
            digests().get(new AlgorithmIdentifier(digest)), new ASN1ObjectIdentifier("1.2.3.4.5"));
        tokens.addCertificates(new CollectionStore<>(Collections.singletonList(cert)));
        tokens.setAccuracyMillis(250);
        Set<String> accepted = new HashSet<>(Arrays.asList(SHA256.getId(), SM3.getId()));
        TimeStampResponse response = new TimeStampResponseGenerator(tokens, accepted)
            .generate(request, BigInteger.valueOf(4711), new Date());
        must(response.getTimeStampToken() != null, "refused: " + response.getStatusString());
        writeDER(a[4], response.getEncoded());
        return "OK stamped";
    }

    public static void main(String[] a) throws Exception {
        Security.addProvider(new BouncyCastleProvider());
        String command = a.length == 0 ? "" : a[0] + "/" + (a[0].equals("tsts") && a.length > 3 ? "n" : a.length);
        try {
            switch (command) {
                case "tst/4": System.out.println(tst(a)); return;
                case "tsts/n": System.out.print(tsts(a)); return;
                case "cms/3": case "cms/4": System.out.println(cms(a)); return;
                case "cmsts/3": System.out.println(cmsts(a)); return;
                case "sign/6": System.out.println(sign(a)); return;
                case "stamp/5": System.out.println(stamp(a)); return;
            }
        } catch (Exception e) {
            System.err.println("BCCheck: " + a[0] + ": " + e);
            System.exit(1);
        }
        System.err.println("usage: BCCheck tst RESP REQ TSA.pem | tsts REQ TSA.pem RESP... | cms MESSAGE SIGNER.pem [CONTENT] | cmsts MESSAGE TSA.pem"
            + " | sign KEY.pem SIGNER.pem CONTENT OUT attached|detached | stamp KEY.pem TSA.pem REQ OUT");
        System.exit(2);
    }
}
