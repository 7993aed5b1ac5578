// Judges a certificate and a CRL with Bouncy Castle, for oracle_test.go. Arguments: root, leaf, CRL (PEM files).
import java.io.FileInputStream;
import java.security.Security;
import java.security.cert.CertificateFactory;
import java.security.cert.X509CRL;
import java.security.cert.X509CRLEntry;
import java.security.cert.X509Certificate;
import org.bouncycastle.jce.provider.BouncyCastleProvider;

public class Check {
    public static void main(String[] args) throws Exception {
        Security.addProvider(new BouncyCastleProvider());
        CertificateFactory f = CertificateFactory.getInstance("X.509", "BC");
        X509Certificate root = (X509Certificate) f.generateCertificate(new FileInputStream(args[0]));
        X509Certificate leaf = (X509Certificate) f.generateCertificate(new FileInputStream(args[1]));
        X509CRL crl = (X509CRL) f.generateCRL(new FileInputStream(args[2]));
        StringBuilder out = new StringBuilder();
        try { root.verify(root.getPublicKey(), "BC"); out.append("root ok"); } catch (Exception e) { out.append("root bad"); }
        try { leaf.verify(root.getPublicKey(), "BC"); out.append(", leaf ok"); } catch (Exception e) { out.append(", leaf bad"); }
        try { crl.verify(root.getPublicKey(), "BC"); out.append(", crl ok"); } catch (Exception e) { out.append(", crl bad"); }
        X509CRLEntry entry = crl.getRevokedCertificate(leaf);
        out.append(entry == null ? ", not revoked" : ", revoked " + entry.getRevocationReason());
        System.out.println(out);
    }
}
