// ERSCheck is the judge from outside: Bouncy Castle (written for 1.72) reads evidence records of ours and makes some for us
// to read.
//
//   verify LIST                                  for each line of the list, RECORD CERTIFICATES.pem DATA... between tabs:
//                                                the data, a group if there are several, is covered; every timestamp of
//                                                the record verifies under one of the certificates. Prints a line for each:
//                                                yes, or no and why
//   make KEY.pem TSA.pem FOLDER DATA...          records over a tree of the data and of the group of all of it:
//                                                FOLDER/0 … for each datum, FOLDER/group for the group,
//                                                FOLDER/renewed and FOLDER/rehashed for the first datum
//
// A success prints one line beginning with OK; anything else prints the reason and exits 1.

import java.io.FileReader;
import java.math.BigInteger;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.security.PrivateKey;
import java.security.Security;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.Date;
import java.util.HashSet;
import java.util.List;

import org.bouncycastle.asn1.ASN1ObjectIdentifier;
import org.bouncycastle.asn1.pkcs.PrivateKeyInfo;
import org.bouncycastle.asn1.tsp.ArchiveTimeStamp;
import org.bouncycastle.asn1.tsp.ArchiveTimeStampChain;
import org.bouncycastle.asn1.x509.AlgorithmIdentifier;
import org.bouncycastle.cert.X509CertificateHolder;
import org.bouncycastle.cms.DefaultCMSSignatureAlgorithmNameGenerator;
import org.bouncycastle.cms.SignerInformationVerifier;
import org.bouncycastle.cms.SignerInfoGeneratorBuilder;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.openssl.PEMParser;
import org.bouncycastle.openssl.jcajce.JcaPEMKeyConverter;
import org.bouncycastle.operator.DefaultSignatureAlgorithmIdentifierFinder;
import org.bouncycastle.operator.DigestCalculatorProvider;
import org.bouncycastle.operator.jcajce.JcaContentSignerBuilder;
import org.bouncycastle.operator.jcajce.JcaContentVerifierProviderBuilder;
import org.bouncycastle.operator.jcajce.JcaDigestCalculatorProviderBuilder;
import org.bouncycastle.tsp.TimeStampRequest;
import org.bouncycastle.tsp.TimeStampRequestGenerator;
import org.bouncycastle.tsp.TimeStampResponse;
import org.bouncycastle.tsp.TimeStampResponseGenerator;
import org.bouncycastle.tsp.TimeStampTokenGenerator;
import org.bouncycastle.tsp.ers.ERSArchiveTimeStamp;
import org.bouncycastle.tsp.ers.ERSArchiveTimeStampGenerator;
import org.bouncycastle.tsp.ers.ERSByteData;
import org.bouncycastle.tsp.ers.ERSData;
import org.bouncycastle.tsp.ers.ERSDataGroup;
import org.bouncycastle.tsp.ers.ERSEvidenceRecord;
import org.bouncycastle.tsp.ers.ERSEvidenceRecordGenerator;
import org.bouncycastle.util.CollectionStore;

public class ERSCheck {
    static final ASN1ObjectIdentifier SHA256 = new ASN1ObjectIdentifier("2.16.840.1.101.3.4.2.1");
    static final ASN1ObjectIdentifier SHA512 = new ASN1ObjectIdentifier("2.16.840.1.101.3.4.2.3");

    static byte[] read(String path) throws Exception {
        return Files.readAllBytes(Paths.get(path));
    }

    static List<X509CertificateHolder> certificates(String path) throws Exception {
        List<X509CertificateHolder> out = new ArrayList<>();
        try (PEMParser p = new PEMParser(new FileReader(path))) {
            for (Object o = p.readObject(); o != null; o = p.readObject()) {
                out.add((X509CertificateHolder) o);
            }
        }
        return out;
    }

    static DigestCalculatorProvider digests() throws Exception {
        return new JcaDigestCalculatorProviderBuilder().setProvider("BC").build();
    }

    static SignerInformationVerifier verifier(X509CertificateHolder cert) throws Exception {
        return new SignerInformationVerifier(new DefaultCMSSignatureAlgorithmNameGenerator(),
            new DefaultSignatureAlgorithmIdentifierFinder(), new JcaContentVerifierProviderBuilder().setProvider("BC").build(cert), digests());
    }

    static ERSData data(String[] a, int from) throws Exception {
        List<ERSData> all = new ArrayList<>();
        for (int i = from; i < a.length; i++) {
            all.add(new ERSByteData(read(a[i])));
        }
        return all.size() == 1 ? all.get(0) : new ERSDataGroup(all);
    }

    static String verify(String[] a) throws Exception {
        StringBuilder out = new StringBuilder("OK");
        for (String line : Files.readAllLines(Paths.get(a[1]))) {
            try {
                int n = verifyOne(line.split("\t"));
                out.append("\nyes ").append(n);
            } catch (Exception e) {
                out.append("\nno ").append(e);
            }
        }
        return out.toString();
    }

    static int verifyOne(String[] a) throws Exception {
        ERSEvidenceRecord record = new ERSEvidenceRecord(read(a[0]), digests());
        record.validatePresent(data(a, 2), new Date(4000000000000L));
        List<X509CertificateHolder> certs = certificates(a[1]);
        int n = 0;
        for (ArchiveTimeStampChain chain : record.toASN1Structure().getArchiveTimeStampSequence().getArchiveTimeStampChains()) {
            for (ArchiveTimeStamp one : chain.getArchiveTimestamps()) {
                ERSArchiveTimeStamp ats = new ERSArchiveTimeStamp(one, digests());
                X509CertificateHolder signer = ats.getSigningCertificate();
                if (!certs.contains(signer)) {
                    throw new IllegalStateException("signed by a stranger: " + (signer == null ? null : signer.getSubject()));
                }
                ats.validate(verifier(signer));
                n++;
            }
        }
        record.validate(verifier(record.getSigningCertificate()));
        return n;
    }

    static PrivateKey key;
    static X509CertificateHolder cert;

    static TimeStampResponse stamp(TimeStampRequest request) throws Exception {
        TimeStampTokenGenerator tokens = new TimeStampTokenGenerator(new SignerInfoGeneratorBuilder(digests())
            .build(new JcaContentSignerBuilder("SHA256withRSA").setProvider("BC").build(key), cert),
            digests().get(new AlgorithmIdentifier(SHA256)), new ASN1ObjectIdentifier("1.2.3.4.5"));
        tokens.addCertificates(new CollectionStore<>(Collections.singletonList(cert)));
        tokens.setAccuracyMillis(250);
        tokens.setResolution(TimeStampTokenGenerator.R_MILLISECONDS);
        Thread.sleep(5); // a timestamp is later than the one before
        TimeStampResponse response = new TimeStampResponseGenerator(tokens, new HashSet<>(Arrays.asList(SHA256.getId(), SHA512.getId())))
            .generate(request, BigInteger.valueOf(4711), new Date());
        if (response.getTimeStampToken() == null) {
            throw new IllegalStateException("refused: " + response.getStatusString());
        }
        return new TimeStampResponse(response.getEncoded("DL"));
    }

    static TimeStampRequestGenerator requests() {
        TimeStampRequestGenerator g = new TimeStampRequestGenerator();
        g.setCertReq(true);
        return g;
    }

    static String make(String[] a) throws Exception {
        try (PEMParser p = new PEMParser(new FileReader(a[1]))) {
            key = new JcaPEMKeyConverter().setProvider("BC").getPrivateKey((PrivateKeyInfo) p.readObject());
        }
        cert = certificates(a[2]).get(0);
        Path folder = Paths.get(a[3]);
        ERSArchiveTimeStampGenerator tree = new ERSArchiveTimeStampGenerator(digests().get(new AlgorithmIdentifier(SHA256)));
        for (int i = 4; i < a.length; i++) {
            tree.addData(new ERSByteData(read(a[i])));
        }
        tree.addData(data(a, 4));
        List<ERSEvidenceRecord> records = new ERSEvidenceRecordGenerator(digests())
            .generate(tree.generateArchiveTimeStamps(stamp(tree.generateTimeStampRequest(requests()))));
        for (int i = 0; i < records.size(); i++) {
            String name = i == records.size() - 1 ? "group" : Integer.toString(i);
            Files.write(folder.resolve(name), records.get(i).toASN1Structure().getEncoded("DER"));
        }
        ERSEvidenceRecord first = records.get(0);
        ERSEvidenceRecord renewed = first.renewTimeStamp(stamp(first.generateTimeStampRenewalRequest(requests())));
        Files.write(folder.resolve("renewed"), renewed.toASN1Structure().getEncoded("DER"));
        ERSData datum = new ERSByteData(read(a[4]));
        ERSEvidenceRecord rehashed = renewed.renewHash(digests().get(new AlgorithmIdentifier(SHA512)), datum,
            stamp(renewed.generateHashRenewalRequest(digests().get(new AlgorithmIdentifier(SHA512)), datum, requests())));
        Files.write(folder.resolve("rehashed"), rehashed.toASN1Structure().getEncoded("DER"));
        return "OK " + records.size() + " records";
    }

    public static void main(String[] a) throws Exception {
        Security.addProvider(new BouncyCastleProvider());
        try {
            System.out.println(a[0].equals("make") ? make(a) : verify(a));
        } catch (Exception e) {
            System.err.println("ERSCheck: " + a[0] + ": " + e + (e.getCause() == null ? "" : ": " + e.getCause()));
            System.exit(1);
        }
    }
}
