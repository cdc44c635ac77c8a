import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;

/**
 * The drill's stateful Java service: everything it knows lives in its heap and nowhere else.
 *
 * PUT /kv/{key} keeps the body, GET /kv/{key} answers it (404 if there is none).
 * POST /log/{name}/{number} appends and answers how many entries the log then has; GET /log/{name} answers all
 * entries, in order, one a line.
 */
public final class KeyValueServer {
    private final ConcurrentHashMap<String, byte[]> values = new ConcurrentHashMap<>();
    private final ConcurrentHashMap<String, List<Long>> logs = new ConcurrentHashMap<>();

    public static void main(String[] arguments) throws IOException {
        KeyValueServer service = new KeyValueServer();
        HttpServer server = HttpServer.create(new InetSocketAddress(Integer.parseInt(arguments[0])), 64);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/", service::handle);
        server.start();
    }

    private void handle(HttpExchange exchange) throws IOException {
        try (exchange) {
            byte[] body = exchange.getRequestBody().readAllBytes();
            String[] path = exchange.getRequestURI().getPath().split("/");
            byte[] answer = switch (exchange.getRequestMethod() + " " + (path.length > 1 ? path[1] : "")) {
                case "PUT kv" -> put(path[2], body);
                case "GET kv" -> values.get(path[2]);
                case "POST log" -> append(path[2], Long.parseLong(path[3]));
                case "GET log" -> log(path[2]);
                default -> null;
            };
            if (answer == null) {
                exchange.sendResponseHeaders(404, -1);
            } else {
                exchange.sendResponseHeaders(200, answer.length == 0 ? -1 : answer.length); // -1: a body of no bytes
                if (answer.length > 0) {
                    exchange.getResponseBody().write(answer);
                }
            }
        }
    }

    private byte[] put(String key, byte[] body) {
        values.put(key, body);
        return new byte[0];
    }

    private byte[] append(String name, long number) {
        List<Long> log = logs.computeIfAbsent(name, ignored -> new ArrayList<>());
        synchronized (log) {
            log.add(number);
            return Integer.toString(log.size()).getBytes(StandardCharsets.US_ASCII);
        }
    }

    private byte[] log(String name) {
        List<Long> log = logs.getOrDefault(name, List.of());
        StringBuilder text = new StringBuilder();
        synchronized (log) {
            log.forEach(number -> text.append(number).append('\n'));
        }
        return text.toString().getBytes(StandardCharsets.US_ASCII);
    }
}
