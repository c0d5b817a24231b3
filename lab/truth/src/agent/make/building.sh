# Builds and installs without end. Programs end before their files go, and what
# an earlier run left is removed.
cd /tmp || exit 1
round=0
rm -rf building target
mkdir -p target/var/lib/dpkg/info target/var/lib/dpkg/updates
: >target/var/lib/dpkg/status
: >target/var/lib/dpkg/available
while :; do
	round=$((round + 1))
	mkdir -p building
	for part in 1 2 3; do
		echo "int part_$part(int x) { int i; for (i = 0; i < $round; i++) x += i * $part; return x; }" >building/$part.c
		tcc -c -o building/$part.o building/$part.c
	done
	cat >building/main.c <<-'END'
		int part_1(int), part_2(int), part_3(int);
		void _start(void) {
			part_1(part_2(part_3(1)));
			__asm__("mov $60, %eax; xor %edi, %edi; syscall");
		}
	END
	tcc -nostdlib -static -o building/program building/main.c building/1.o building/2.o building/3.o &&
		building/program && echo $round >/run/built
	rm -rf building
	dpkg --root=/tmp/target --force-all --install /etc/packages/package.deb >/run/installed 2>&1 &&
		dpkg --root=/tmp/target --force-all --purge hostname >/run/purged 2>&1 &&
		echo $round >/run/packaged
done
