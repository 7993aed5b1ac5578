// SM2 encryption by Bouncy Castle: java -cp bcprov.jar SM2Crypt.java HEX-POINT PLAINTEXT-FILE D-HEX CIPHERTEXT-FILE
// Prints the ciphertext of the plaintext for the point, C1 C3 C2, and the plaintext of the ciphertext by d; both in hex.
import java.math.BigInteger;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.SecureRandom;
import org.bouncycastle.asn1.gm.GMNamedCurves;
import org.bouncycastle.asn1.x9.X9ECParameters;
import org.bouncycastle.crypto.engines.SM2Engine;
import org.bouncycastle.crypto.params.ECDomainParameters;
import org.bouncycastle.crypto.params.ECPrivateKeyParameters;
import org.bouncycastle.crypto.params.ECPublicKeyParameters;
import org.bouncycastle.crypto.params.ParametersWithRandom;
import org.bouncycastle.util.encoders.Hex;

public class SM2Crypt {
    public static void main(String[] args) throws Exception {
        X9ECParameters x = GMNamedCurves.getByName("sm2p256v1");
        ECDomainParameters curve = new ECDomainParameters(x.getCurve(), x.getG(), x.getN(), x.getH());
        byte[] plain = Files.readAllBytes(Path.of(args[1]));
        SM2Engine engine = new SM2Engine(SM2Engine.Mode.C1C3C2);
        engine.init(true, new ParametersWithRandom(
                new ECPublicKeyParameters(x.getCurve().decodePoint(Hex.decode(args[0])), curve), new SecureRandom()));
        System.out.println(Hex.toHexString(engine.processBlock(plain, 0, plain.length)));
        byte[] ciphertext = Files.readAllBytes(Path.of(args[3]));
        engine.init(false, new ECPrivateKeyParameters(new BigInteger(args[2], 16), curve));
        System.out.println(Hex.toHexString(engine.processBlock(ciphertext, 0, ciphertext.length)));
    }
}
