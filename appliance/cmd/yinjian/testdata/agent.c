/* A maker's daemon for TestPack: it says who it is in DIR/agent.pid when it is ready, and stays, beside a process of its
   that has gone into the background. */
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char fresh[4096], ready[4096];
	if (argc < 2)
		return 2;
	if (fork() == 0) {
		setsid();
		for (;;)
			pause();
	}
	snprintf(fresh, sizeof fresh, "%s/agent.new", argv[1]);
	snprintf(ready, sizeof ready, "%s/agent.pid", argv[1]);
	FILE *f = fopen(fresh, "w");
	if (!f || fprintf(f, "%d\n", (int)getpid()) < 0 || fclose(f) || rename(fresh, ready))
		return 1;
	for (;;)
		pause();
}
