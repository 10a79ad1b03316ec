import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.concurrent.locks.LockSupport;

/**
 * Threads that park, read from a socket, contend for a monitor and compute; prints "ready". A byte on
 * standard input starts one more, whose code is compiled only then; its end ends the program.
 */
public class Waits {
    static final Object lock = new Object();
    static volatile double sink;

    static double compute(int n) {
        double sum = 0;
        for (int i = 1; i < n; i++) sum += Math.sqrt(i) / i;
        return sum;
    }

    static void parkOnce() {
        LockSupport.parkNanos(1_000_000);
        sink += compute(2000);
    }

    static void contendOnce() {
        synchronized (lock) {
            sink += compute(20_000);
        }
        LockSupport.parkNanos(50_000);
    }

    static void computeOnce() {
        sink += compute(200_000);
    }

    static void lateOnce() {
        LockSupport.parkNanos(300_000);
        sink += compute(5000);
    }

    static void serveOnce(InputStream in, OutputStream out) throws IOException {
        int request = in.read();
        sink += compute(5000);
        out.write(request);
    }

    static void askOnce(InputStream in, OutputStream out) throws IOException {
        out.write(1);
        in.read();
        LockSupport.parkNanos(200_000);
    }

    interface Exchange {
        void once(InputStream in, OutputStream out) throws IOException;
    }

    static void start(Runnable step) {
        Thread thread = new Thread(() -> {
            for (;;) step.run();
        });
        thread.setDaemon(true);
        thread.start();
    }

    static void start(Socket socket, Exchange step) throws IOException {
        InputStream in = socket.getInputStream();
        OutputStream out = socket.getOutputStream();
        start(() -> {
            try {
                step.once(in, out);
            } catch (IOException error) {
                throw new RuntimeException(error);
            }
        });
    }

    public static void main(String[] arguments) throws IOException {
        InetAddress here = InetAddress.getLoopbackAddress();
        ServerSocket listening = new ServerSocket(0, 1, here);
        start(new Socket(here, listening.getLocalPort()), Waits::askOnce);
        start(listening.accept(), Waits::serveOnce);
        start(Waits::parkOnce);
        start(Waits::contendOnce);
        start(Waits::contendOnce);
        start(Waits::computeOnce);
        System.out.println("ready");
        if (System.in.read() >= 0) start(Waits::lateOnce);
        while (System.in.read() >= 0) continue;
    }
}
