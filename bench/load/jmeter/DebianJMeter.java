// Debian 的 JMeter 2.13 与同一发行版的 XStream 不合：XStream 自 1.4.18 起只读登记过的类，2.13 没有登记，任何计划都打不开。
// 这里登记后再启动；上游的 JMeter 不需要。
// Debian's JMeter 2.13 cannot open any plan beside Debian's XStream, which since 1.4.18 reads registered classes alone, and 2.13
// registers none. This registers JMeter's own before it starts. Upstream's JMeter needs nothing of this.

import com.thoughtworks.xstream.XStream;
import java.lang.reflect.Field;
import org.apache.jmeter.JMeter;
import org.apache.jmeter.save.SaveService;
import org.apache.jmeter.util.JMeterUtils;

public final class DebianJMeter {
    private DebianJMeter() {
    }

    public static void main(String[] args) throws Exception {
        JMeterUtils.loadJMeterProperties(System.getProperty("jmeter.home") + "/bin/jmeter.properties"); // SaveService reads them
        JMeterUtils.setJMeterHome(System.getProperty("jmeter.home"));
        int found = 0;
        for (Field f : SaveService.class.getDeclaredFields()) {
            if (XStream.class.isAssignableFrom(f.getType())) {
                f.setAccessible(true);
                ((XStream) f.get(null)).allowTypesByWildcard(new String[] {"org.apache.jmeter.**", "org.apache.jorphan.**", "java.**"});
                found++;
            }
        }
        if (found == 0) {
            throw new IllegalStateException("this JMeter is another one: start it with its own command");
        }
        new JMeter().start(args);
    }
}
