# Makes openCryptoki's software token in namespaces of its own, and runs a command that sees it. Nothing outside changes,
# and pkcsslotd ends with the command, which is the first process in here.
set -eu
mount --make-rprivate /
mount -t proc proc /proc
for d in /run /var/lib/opencryptoki /var/log /dev/shm; do
	mount -t tmpfs -o mode=755 tmpfs $d
done
mkdir -p /run/lock/opencryptoki/swtok /var/lib/opencryptoki/swtok/TOK_OBJ /var/log/opencryptoki # the package leaves the last to a boot
chown -R root:pkcs11 /run/lock /var/lib/opencryptoki /var/log/opencryptoki
chmod -R 770 /run/lock/opencryptoki /var/lib/opencryptoki
printf 'version opencryptoki-3.1\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n' >/run/opencryptoki.conf
mount --bind /run/opencryptoki.conf /etc/opencryptoki/opencryptoki.conf
pkcsslotd
# Both PINs must be changed from what they are at first.
printf '%s\n' "$LABEL" | pkcsconf -I -c 3 -S 87654321 >/dev/null
pkcsconf -P -c 3 -S 87654321 -n 76543210
pkcsconf -u -c 3 -S 76543210 -n 11111111
pkcsconf -p -c 3 -U 11111111 -n "$PIN"
exec "$@"
