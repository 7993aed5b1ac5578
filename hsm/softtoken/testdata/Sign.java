import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.security.Key;
import java.security.KeyPair;
import java.security.KeyPairGenerator;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.Provider;
import java.security.PublicKey;
import java.security.Security;
import java.security.Signature;
import java.security.cert.Certificate;
import java.security.spec.MGF1ParameterSpec;
import java.security.spec.PSSParameterSpec;
import java.util.Base64;

/** Signs with the module through SunPKCS11: Sign CONFIG PIN MESSAGE SIGNATURE. Prints what it did. */
public class Sign {
    public static void main(String[] args) throws Exception {
        Provider p11 = Security.getProvider("SunPKCS11").configure(args[0]);
        Security.addProvider(p11);
        byte[] message;
        try (FileInputStream in = new FileInputStream(args[2])) {
            message = in.readAllBytes();
        }
        KeyStore store = KeyStore.getInstance("PKCS11", p11);
        store.load(null, args[1].toCharArray());

        // A key of the token with its certificate.
        Key key = store.getKey("r", null);
        Certificate cert = store.getCertificate("r");
        byte[] sig = sign(p11, "SHA256withRSA", (PrivateKey) key, message);
        verify("SHA256withRSA", cert.getPublicKey(), message, sig);
        try (FileOutputStream out = new FileOutputStream(args[3])) {
            out.write(sig);
        }
        System.out.println("key store signs");

        // RSASSA-PSS as TLS 1.3 has it, and a salt that the token does not make.
        PSSParameterSpec pss = new PSSParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA256, 32, 1);
        Signature p = Signature.getInstance("RSASSA-PSS", p11);
        p.setParameter(pss);
        p.initSign((PrivateKey) key);
        p.update(message);
        byte[] padded = p.sign();
        Signature outside = Signature.getInstance("RSASSA-PSS", "SunRsaSign");
        outside.setParameter(pss);
        outside.initVerify(cert.getPublicKey());
        outside.update(message);
        if (!outside.verify(padded)) {
            throw new Exception("SunRsaSign does not verify the token's RSASSA-PSS");
        }
        try {
            p = Signature.getInstance("RSASSA-PSS", p11);
            p.setParameter(new PSSParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA256, 20, 1));
            p.initSign((PrivateKey) key);
            p.update(message);
            p.sign();
            throw new Exception("the token signs with another salt");
        } catch (java.security.ProviderException | java.security.InvalidKeyException | java.security.SignatureException e) {
            System.out.println("PSS signs, and with another salt: " + e);
        }

        // Verifying and digesting on the token.
        Signature v = Signature.getInstance("SHA256withRSA", p11);
        v.initVerify(cert.getPublicKey());
        v.update(message);
        if (!v.verify(sig)) {
            throw new Exception("the token does not verify its own signature");
        }
        message[0] ^= 1;
        v.initVerify(cert.getPublicKey());
        v.update(message);
        if (v.verify(sig)) {
            throw new Exception("the token verifies a signature over something else");
        }
        System.out.println("token verifies");

        // A session key pair.
        KeyPairGenerator g = KeyPairGenerator.getInstance("RSA", p11);
        g.initialize(2048);
        KeyPair pair = g.generateKeyPair();
        sig = sign(p11, "SHA256withRSA", pair.getPrivate(), message);
        verify("SHA256withRSA", pair.getPublic(), message, sig);
        System.out.println("generated key signs");

        // Digests that the token does not have are computed by Java, and the token pads and signs.
        for (String algorithm : new String[] {"SHA384withRSA", "SHA1withRSA"}) {
            try {
                sig = sign(p11, algorithm, (PrivateKey) key, message);
                verify(algorithm, cert.getPublicKey(), message, sig);
                System.out.println(algorithm + " signs");
            } catch (java.security.NoSuchAlgorithmException e) {
                System.out.println(algorithm + " is not offered");
            }
        }
    }

    static byte[] sign(Provider p, String algorithm, PrivateKey key, byte[] message) throws Exception {
        Signature s = Signature.getInstance(algorithm, p);
        s.initSign(key);
        for (int i = 0; i < message.length; i += 1000) {
            s.update(message, i, Math.min(1000, message.length - i));
        }
        return s.sign();
    }

    static void verify(String algorithm, PublicKey key, byte[] message, byte[] sig) throws Exception {
        Signature s = Signature.getInstance(algorithm, "SunRsaSign");
        java.security.KeyFactory f = java.security.KeyFactory.getInstance("RSA", "SunRsaSign");
        s.initVerify((PublicKey) f.translateKey(key));
        s.update(message);
        if (!s.verify(sig)) {
            throw new Exception("SunRsaSign does not verify " + Base64.getEncoder().encodeToString(sig));
        }
    }
}
