/* A maker's daemon as one may come: it listens on a socket and answers who connects. For TestPacks. */
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), one;
	if (argc != 2 || fd < 0)
		return 2;
	snprintf(at.sun_path, sizeof at.sun_path, "%s", argv[1]);
	if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 8)) {
		perror(argv[1]);
		return 1;
	}
	puts("listening");
	fflush(stdout);
	while ((one = accept(fd, NULL, NULL)) >= 0) {
		if (write(one, "ok", 2) != 2)
			perror("write");
		close(one);
	}
	return 1;
}
